"""The primer's picture of a decoder layer, with the shapes of the shipped model `tiny`."""

from __future__ import annotations

from .geometry import Point, Rect
from .metrics import BOLD, CODE, SMALL, text_width
from .svg import MARGIN, WIDTH, Drawing

RIGHT = WIDTH - MARGIN
TOKENS = ("What", "is", "a", "KV", "cache")  # the tokens of "What is a KV cache", without their spaces
NUM_LAYERS, NUM_HEADS, NUM_KV_HEADS = 6, 8, 4
HIDDEN = "[5, 256]"


def transformer_shapes() -> Drawing:
    """The whole model on the left, one of its layers on the right, with the shape of every tensor for five tokens."""
    drawing = Drawing(
        "One decoder layer and its shapes",
        "The model tiny for the five tokens What is a KV cache. Left: token ids, embed_tokens, six decoder layers, "
        "norm and compute_logits, whose result has 4096 numbers for the last token. Right: one layer. Attention: "
        "input_layernorm, qkv_proj, which makes 8 query heads, 4 key heads and 4 value heads of 32 numbers per "
        "token, rotate (RoPE), attend, o_proj, and the residual connection. MLP: post_attention_layernorm, "
        "gate_up_proj, silu, down_proj, and another residual connection.",
    )
    top = drawing.heading(
        "Green: operations, with the shape of their weights. Blue boxes and gray text: tensors, for 5 tokens."
    )
    stack = _whole_model(drawing, Rect(MARGIN, top, 176, 606))
    panel = drawing.panel(Rect(224, top, RIGHT - 224, 606), "One of the 6 decoder layers", "green")
    drawing.line([(stack.right + 8, stack.y), (panel.x, panel.y + 16)], dashed=True)
    drawing.line([(stack.right + 8, stack.bottom + 8), (panel.x, panel.bottom - 16)], dashed=True)
    out = _attention(drawing, panel.x + 54, panel.y + 44)
    _mlp(drawing, panel.x + 388, panel.y + 44, out)
    _grouped_heads(drawing, panel.x + 356, panel.y + 464)
    return drawing


def _operation(drawing: Drawing, rect: Rect, name: str, weights: str = "") -> Rect:
    """A green box with a bold name, and the shape of its weights beside it."""
    drawing.shape(rect, "green")
    width = text_width(name, BOLD) + (10 + CODE.width(weights) if weights else 0)
    end = drawing.text(rect.cx - width / 2, rect.cy, name, BOLD).right
    if weights:
        drawing.text(end + 10, rect.cy, weights, CODE)
    return rect


def _down(drawing: Drawing, above: Rect, below: Rect, shape: str = "") -> None:
    """An arrow from a box to the one below, with a tensor's shape beside it."""
    drawing.arrow([(below.cx, above.bottom), below.top_center], f"`{shape}`" if shape else "", "right")


def _whole_model(drawing: Drawing, area: Rect) -> Rect:
    """Returns the box that stands for the layers."""
    x, width = area.x + 8, 144
    drawing.text(x, area.y + 18, "The whole model", BOLD)
    drawing.text(x, area.y + 44, "token ids `[5]`", SMALL, "muted")
    for index, token in enumerate(TOKENS):
        drawing.cells(x, area.y + 58 + 20 * index, [token], (width, 20), "blue")
    ids = Rect(x, area.y + 58, width, 100)
    embed = drawing.box(Rect(x, ids.bottom + 30, width, 44), "`embed_tokens`", ["`[4096, 256]`"], "green")
    _down(drawing, ids, embed)
    stack = Rect(x, embed.bottom + 36, width, 70)
    for offset in (8, 4):  # the other layers, behind
        drawing.shape(Rect(x + offset, stack.y + offset, width, stack.height), "green", check=False)
    drawing.box(stack, "6 decoder layers", ["each as shown"], "green", strong=True)
    _down(drawing, embed, stack, HIDDEN)
    norm = drawing.box(Rect(x, stack.bottom + 44, width, 44), "`norm`", ["RMSNorm, `[256]`"], "green")
    _down(drawing, Rect(stack.x, stack.y, width, stack.height + 8), norm, HIDDEN)
    logits = drawing.box(
        Rect(x, norm.bottom + 36, width, 58), "`compute_logits`", ["`embed_tokens` again:", "tied weights"], "green"
    )
    _down(drawing, norm, logits, "[1, 256]")
    drawing.arrow([logits.bottom_center, (logits.cx, logits.bottom + 34)], "`[1, 4096]`", "right")
    drawing.text(logits.cx, logits.bottom + 48, "logits of the last token", SMALL, anchor="middle")
    return stack


def _attention(drawing: Drawing, x: float, y: float) -> Point:
    """The first half of a layer. Returns where the hidden state leaves it."""
    width = 272
    drawing.text(x, y, "Attention", BOLD, "green-ink")
    start = Rect(x, y + 4, width, 12)
    norm = _operation(drawing, Rect(x, y + 44, width, 34), "`input_layernorm`", "[256]")
    _down(drawing, start, norm, HIDDEN)
    qkv = _operation(drawing, Rect(x, norm.bottom + 34, width, 34), "`qkv_proj`", "[512, 256]")
    _down(drawing, norm, qkv, HIDDEN)
    heads = _split(drawing, qkv)
    rotate = drawing.box(Rect(x, heads[0].bottom + 26, 201, 40), "`rotate`", ["RoPE: by the token's position"], "green")
    attend = drawing.box(
        Rect(x, rotate.bottom + 28, width, 62), "`attend`",
        ["each query reads the keys and values", "of its own and all earlier tokens"], "green", strong=True,
    )  # fmt: skip
    for head in heads[:2]:
        drawing.arrow([head.bottom_center, (head.cx, rotate.y)])
        drawing.arrow([(head.cx, rotate.bottom), (head.cx, attend.y)])
    drawing.arrow([heads[2].bottom_center, (heads[2].cx, attend.y)])
    o_proj = _operation(drawing, Rect(x, attend.bottom + 34, width, 34), "`o_proj`", "[256, 256]")
    _down(drawing, attend, o_proj, HIDDEN)
    drawing.text(attend.cx - 9, (attend.bottom + o_proj.y) / 2, "`[5, 8, 32]` =", SMALL, "muted", "end")
    return _add_residual(drawing, start, o_proj)


def _split(drawing: Drawing, qkv: Rect) -> list[Rect]:
    """Queries, keys and values, as wide as they are large."""
    y, heads = qkv.bottom + 24, []
    for name, num_heads, left, width in (
        ("query", NUM_HEADS, 0, 124), ("key", NUM_KV_HEADS, 130, 71), ("value", NUM_KV_HEADS, 207, 65),
    ):  # fmt: skip
        rect = Rect(qkv.x + left, y, width, 46)
        heads.append(drawing.box(rect, "", [name, f"`[5,{num_heads},32]`"], "blue"))
        drawing.arrow([(rect.cx, qkv.bottom), rect.top_center])
    return heads


def _add_residual(drawing: Drawing, start: Rect, last: Rect) -> Point:
    """The circle in which the half's input is added to its result. Returns the circle's center."""
    center = (last.cx, last.bottom + 44)
    _down(drawing, last, Rect(last.x, center[1] - 10, last.width, 1), HIDDEN)
    lane, y = last.x - 24, start.bottom
    drawing.arrow([(last.cx, y), (lane, y), (lane, center[1]), (center[0] - 10, center[1])])
    drawing.dot(last.cx, y)
    drawing.body.append(f'<circle class="grey" cx="{center[0]:g}" cy="{center[1]:g}" r="10"/>')
    drawing.line([(center[0] - 5, center[1]), (center[0] + 5, center[1])])
    drawing.line([(center[0], center[1] - 5), (center[0], center[1] + 5)])
    drawing.text(last.x - 12, center[1] - 14, "residual", SMALL, "muted")
    return center


def _mlp(drawing: Drawing, x: float, y: float, source: Point) -> None:
    width = 200
    drawing.text(x, y, "MLP", BOLD, "green-ink")
    start = Rect(x, y + 4, width, 12)
    norm = _operation(drawing, Rect(x - 12, y + 44, width + 24, 34), "`post_attention_layernorm`")
    lane = x - 54
    drawing.arrow([(source[0] + 10, source[1]), (lane, source[1]), (lane, y + 16), (norm.cx, y + 16), norm.top_center])
    drawing.text(norm.cx + 9, (y + 16 + norm.y) / 2, f"`{HIDDEN}`", SMALL, "muted")
    gate_up = _operation(drawing, Rect(x - 12, norm.bottom + 34, width + 24, 34), "`gate_up_proj`", "[1536, 256]")
    _down(drawing, norm, gate_up, HIDDEN)
    halves = []
    for index, name in enumerate(("gate", "up")):
        rect = Rect(x - 12 + index * 115, gate_up.bottom + 24, 109, 46)
        halves.append(drawing.box(rect, "", [name, "`[5, 768]`"], "blue"))
        drawing.arrow([(rect.cx, gate_up.bottom), rect.top_center])
    silu = _operation(drawing, Rect(x - 12, halves[0].bottom + 26, width + 24, 34), "silu(gate) · up")
    for rect in halves:
        drawing.arrow([rect.bottom_center, (rect.cx, silu.y)])
    down = _operation(drawing, Rect(x - 12, silu.bottom + 34, width + 24, 34), "`down_proj`", "[256, 768]")
    _down(drawing, silu, down, "[5, 768]")
    end = _add_residual(drawing, start, down)
    drawing.arrow([(end[0] + 10, end[1]), (end[0] + 42, end[1])])
    drawing.text(end[0] + 48, end[1], "next layer", SMALL, "muted")


def _grouped_heads(drawing: Drawing, x: float, y: float) -> None:
    """Which query heads share a key/value head."""
    width = 29
    drawing.text(x, y, "GQA: 2 query heads share a KV head", BOLD, "green-ink")
    queries = drawing.cells(x, y + 18, [f"q{head}" for head in range(NUM_HEADS)], (width, 26), "blue")
    kv = drawing.cells(x, y + 76, [f"kv{head}" for head in range(NUM_KV_HEADS)], (2 * width, 26), "blue", strong=True)
    for head, rect in enumerate(queries):
        drawing.line([rect.bottom_center, (kv[head // 2].cx + (head % 2 - 0.5) * 12, kv[0].y)])
    drawing.text(x, y + 120, "So the KV cache is half as large.", SMALL, "muted")
