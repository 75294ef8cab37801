"""Colors and fonts of all diagrams, for light and dark pages.

A drawing uses CSS variables only. Colors carry the same meaning everywhere: blue is the API and prompts, purple the
core, green the worker, orange what is generated or new. None is the only carrier of a meaning.
"""

from __future__ import annotations

SANS = '-apple-system,BlinkMacSystemFont,"Segoe UI","Noto Sans",Helvetica,Arial,sans-serif'
MONO = 'ui-monospace,SFMono-Regular,"SF Mono",Menlo,Consolas,"Liberation Mono",monospace'

HUES = ("blue", "purple", "green", "orange", "grey")

LIGHT = {
    "page": "#ffffff", "frame": "#d1d9e0", "panel": "#f6f8fa", "panel-line": "#d1d9e0",
    "ink": "#1f2328", "muted": "#57606a", "line": "#6e7781", "on-accent": "#ffffff",
    "blue-fill": "#e3f1fb", "blue-strong": "#a9d5f2", "blue-line": "#0072b2", "blue-ink": "#00598c",
    "purple-fill": "#f5e9f3", "purple-strong": "#e2bcd8", "purple-line": "#a04f8b", "purple-ink": "#7f3a6d",
    "green-fill": "#dff4ec", "green-strong": "#9bdfc6", "green-line": "#00855f", "green-ink": "#006b4c",
    "orange-fill": "#fdebdd", "orange-strong": "#f9c49b", "orange-line": "#c65200", "orange-ink": "#a34300",
    "grey-fill": "#eff2f5", "grey-strong": "#d5dce3", "grey-line": "#8c959f", "grey-ink": "#57606a",
}  # fmt: skip
DARK = {
    "page": "#0d1117", "frame": "#30363d", "panel": "#151b23", "panel-line": "#30363d",
    "ink": "#e6edf3", "muted": "#9da7b3", "line": "#8b949e", "on-accent": "#0d1117",
    "blue-fill": "#0d2c43", "blue-strong": "#13517c", "blue-line": "#4aa8e0", "blue-ink": "#8ccdf5",
    "purple-fill": "#341d31", "purple-strong": "#653660", "purple-line": "#cf8bbf", "purple-ink": "#e9b8de",
    "green-fill": "#0a3329", "green-strong": "#0d664e", "green-line": "#2fbf95", "green-ink": "#7fe0c1",
    "orange-fill": "#3d210c", "orange-strong": "#854412", "orange-line": "#f0883e", "orange-ink": "#ffb77c",
    "grey-fill": "#1d242d", "grey-strong": "#3a434e", "grey-line": "#7d8590", "grey-ink": "#9da7b3",
}  # fmt: skip


def style_sheet() -> str:
    """The CSS of every drawing."""
    rules = [
        f"svg{{{_variables(LIGHT)}}}",
        f"@media (prefers-color-scheme: dark){{svg{{{_variables(DARK)}}}}}",
        f"text{{font-family:{SANS};fill:var(--ink)}}",
        f".mono{{font-family:{MONO}}}",
        ".bold{font-weight:600}",
        ".page{fill:var(--page);stroke:var(--frame)}",
        ".panel{fill:var(--panel);stroke:var(--panel-line)}",
        ".muted{fill:var(--muted)}",
        ".on-accent{fill:var(--on-accent)}",
        ".line{fill:none;stroke:var(--line)}",
        ".line-head{fill:var(--line)}",
        "rect,path{stroke-width:1.3}",
        ".mark{stroke-width:2.4;stroke-linecap:round;stroke-linejoin:round}",
        ".ghost{fill:none;stroke:var(--frame)}",
        ".hatch{fill:url(#hatch);stroke:var(--grey-line)}",
    ]
    for hue in HUES:
        rules += [
            f".{hue}{{fill:var(--{hue}-fill);stroke:var(--{hue}-line)}}",
            f".{hue}-strong{{fill:var(--{hue}-strong);stroke:var(--{hue}-line)}}",
            f".{hue}-ink{{fill:var(--{hue}-ink)}}",
            f".{hue}-line{{fill:none;stroke:var(--{hue}-line)}}",
            f".{hue}-head{{fill:var(--{hue}-line)}}",
        ]
    return "\n".join(rules)


def _variables(colors: dict[str, str]) -> str:
    return ";".join(f"--{name}:{value}" for name, value in colors.items())
