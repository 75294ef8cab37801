"""common/plotting.py: the same bytes for the same picture, the palette's colors, the size limit."""

import subprocess
import sys
from pathlib import Path

import matplotlib
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from PIL import Image

from common.plotting import BASELINE_COLOR, COLORS, MAX_PNG_BYTES, figure, label_bars, label_line, panels, save


def example() -> Figure:
    fig, axes = figure("throughput", "requests in flight", "tokens/s")
    for name, factor in (("this part", 3.0), ("before", 2.0)):
        (line,) = axes.plot([1, 2, 4], [factor, 2 * factor, 4 * factor])
        label_line(axes, line, name)
    return fig


def test_the_same_picture_gives_the_same_bytes(tmp_path: Path) -> None:
    save(example(), tmp_path / "a.png")
    save(example(), tmp_path / "plots" / "b.png")
    picture = (tmp_path / "a.png").read_bytes()
    assert picture == (tmp_path / "plots" / "b.png").read_bytes()
    assert b"Software" not in picture and b"tEXt" not in picture, "the PNG holds metadata, which changes with versions"


def test_another_picture_gives_other_bytes(tmp_path: Path) -> None:
    save(example(), tmp_path / "a.png")
    fig = example()
    fig.axes[0].plot([1, 4], [0, 0])
    save(fig, tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "b.png").read_bytes()


def test_a_users_own_style_does_not_change_the_picture(tmp_path: Path) -> None:
    save(example(), tmp_path / "a.png")
    with matplotlib.rc_context({"lines.linewidth": 9, "axes.facecolor": "red", "savefig.bbox": "tight"}):
        save(example(), tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_saved_colors_are_the_palettes(tmp_path: Path) -> None:
    fig, axes = figure("bars", "", "tokens/s")
    for position in range(len(COLORS)):
        axes.bar([position], [10 + position])
    axes.bar([len(COLORS)], [10], color=BASELINE_COLOR)
    save(fig, tmp_path / "bars.png")
    with Image.open(tmp_path / "bars.png") as image:
        counted = image.convert("RGB").getcolors(image.width * image.height)
    assert counted is not None
    found = {"#{:02X}{:02X}{:02X}".format(*color) for count, color in counted if count > 5000}  # type: ignore[misc]
    missing = {*COLORS, BASELINE_COLOR} - found
    assert not missing, f"colors {missing} were drawn, but the saved picture has {found}"


def test_a_readme_shows_it_sharp(tmp_path: Path) -> None:
    save(example(), tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        assert image.size == (1440, 768), "900 x 480 pixels, 1.6 times as sharp"
    assert (tmp_path / "a.png").stat().st_size < MAX_PNG_BYTES


def test_a_line_label_is_at_the_lines_end_in_its_color() -> None:
    labels = example().axes[0].texts
    assert [label.get_text() for label in labels] == ["this part", "before"]
    assert [to_hex(label.get_color()).upper() for label in labels] == list(COLORS[:2])
    assert [label.xy for label in labels] == [(4.0, 12.0), (4.0, 8.0)]  # type: ignore[attr-defined]


def test_bar_labels_show_the_values() -> None:
    _, axes = figure("bars", "", "tokens/s")
    label_bars(axes, axes.bar(["a", "b"], [1234.4, 7]))
    assert [label.get_text() for label in axes.texts] == ["1,234", "7"]


def test_panels_have_labels_of_their_own() -> None:
    _, axes_list = panels([("TTFT", "rate", "ms"), ("TPOT", "load", "s")])
    labels = [(axes.get_title(loc="left"), axes.get_xlabel(), axes.get_ylabel()) for axes in axes_list]
    assert labels == [("TTFT", "rate", "ms"), ("TPOT", "load", "s")]


def test_save_refuses_a_picture_too_large_and_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("common.plotting.MAX_PNG_BYTES", 1000)
    with pytest.raises(ValueError, match="a.png: .* over MAX_PNG_BYTES=1,000"):
        save(example(), tmp_path / "a.png")
    assert not (tmp_path / "a.png").exists()


def test_save_refuses_other_formats(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a.svg: plots are saved as .png"):
        save(example(), tmp_path / "a.svg")


def test_importing_plotting_does_not_import_matplotlib() -> None:
    code = "import sys, common.plotting; sys.exit('matplotlib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=False)
    assert done.returncode == 0, "import common.plotting imports matplotlib, which takes a second"
