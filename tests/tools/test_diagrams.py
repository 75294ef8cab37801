"""tools/diagrams: the files are what the scripts make, they are readable, and they show what the code does."""

from __future__ import annotations

import json
import re
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from common.checkpoint import resolve_checkpoint
from common.openai_app.metrics import Metrics
from part06_chunked_prefill.core.block_manager import BlockManager as Part06BlockManager
from part06_chunked_prefill.core.request import Request as Part06Request
from part06_chunked_prefill.core.scheduler import Scheduler
from part07_prefix_caching.core.block_manager import BlockManager
from part07_prefix_caching.core.request import Request
from part14_quantization.worker import attention as part14_attention
from part14_quantization.worker import kv_cache as part14_kv_cache
from part14_quantization.worker import linear as part14_linear
from part14_quantization.worker import model as part14_model
from part14_quantization.worker import parallel as part14_parallel
from part14_quantization.worker.quantization import cpu_kernels, products
from part14_quantization.worker.quantization.gptq import inverse_factor, spread_error
from part14_quantization.worker.quantization.kv_codes import KVFormat as Part14KVFormat
from part14_quantization.worker.quantization.packing import pack_nibbles
from part14_quantization.worker.quantization.scheme import Scheme, dequantize, quantize
from part15_full_architecture.worker import model as part15_model
from part15_full_architecture.worker.attention import AttentionMetadata, PagedAttention
from part15_full_architecture.worker.graphs import StepGraphs
from part15_full_architecture.worker.kernels import autotune, build, ops, reference
from part15_full_architecture.worker.kernels.cpu import whole_step
from part15_full_architecture.worker.kernels.cuda import attention as cuda_attention
from part15_full_architecture.worker.kv_cache import KVCache
from part15_full_architecture.worker.parallel import Groups
from part15_full_architecture.worker.quantization.kv_codes import KVFormat
from tests.scripted import params_for
from tools.diagrams import __main__ as command
from tools.diagrams import (
    architecture,
    batches,
    fusion,
    gpu,
    kernel_choice,
    kv_blocks,
    metrics,
    one_request,
    overview,
    quantization,
    quantized_layers,
    step_graphs,
    team,
    theme,
    transformer,
)
from tools.diagrams.catalog import DIAGRAMS
from tools.diagrams.checks import problems
from tools.diagrams.geometry import Rect
from tools.diagrams.svg import Drawing

ROOT = Path(__file__).resolve().parents[2]
SVG = "{http://www.w3.org/2000/svg}"
REFERENCE = re.compile(r"docs/diagrams/([\w.-]+)\.svg|\]\((?:\./)?diagrams/([\w.-]+)\.svg")
CUDA_FILES = sorted((ROOT / "part15_full_architecture" / "worker" / "kernels" / "cuda").rglob("*.cu*"))
PARTS = sorted(path for path in ROOT.glob("part[0-9][0-9]_*") if path.is_dir())
each_diagram = pytest.mark.parametrize("name", sorted(DIAGRAMS))


def pages() -> list[Path]:
    """The repository's Markdown, without what tools put there."""
    return [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("models/*.md"), *ROOT.glob("part*/**/*.md")]


def references(page: Path) -> set[str]:
    found = REFERENCE.findall(page.read_text(encoding="utf-8"))
    return {one or other for one, other in found}


def luminance(color: str) -> float:
    """WCAG's relative luminance of #rrggbb."""
    channels = [int(color[index : index + 2], 16) / 255 for index in (1, 3, 5)]
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


# The files


def test_files_are_what_the_scripts_make() -> None:
    differing = [path.name for path in command.differing_files()]
    assert not differing, f"docs/diagrams: {differing} differ from the scripts: run python -m tools.diagrams"


def test_check_names_each_file_that_differs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "DIRECTORY", tmp_path / "docs" / "diagrams")
    monkeypatch.setattr(sys, "argv", ["diagrams"])
    assert command.main() == 0, "the files are written"
    monkeypatch.setattr(sys, "argv", ["diagrams", "--check"])
    assert command.main() == 0, "nothing differs right after writing"
    (command.DIRECTORY / "slots.svg").write_text("changed", encoding="utf-8")
    (command.DIRECTORY / "chunks.svg").unlink()
    (command.DIRECTORY / "recording.svg").write_text("made by another tool", encoding="utf-8")
    assert command.main() == 1, "two files differ"
    lines = capsys.readouterr().out.splitlines()
    assert [re.findall(r"(\w+)\.svg", line)[0] for line in lines] == ["chunks", "slots"]


@each_diagram
def test_drawing_twice_gives_the_same_bytes(name: str) -> None:
    assert DIAGRAMS[name]().svg() == DIAGRAMS[name]().svg(), f"{name}: two runs differ"


@each_diagram
def test_an_svg_is_well_formed_and_has_words_for_screen_readers(name: str) -> None:
    root = ET.fromstring(DIAGRAMS[name]().svg())
    title, desc = root.find(f"{SVG}title"), root.find(f"{SVG}desc")
    assert title is not None and title.text, f"{name} has no title"
    assert desc is not None and desc.text and len(desc.text) > 80, f"{name} has no desc that tells what it shows"
    assert root.get("role") == "img" and root.get("aria-labelledby") == "title desc", f"{name}: role, aria-labelledby"
    assert float(root.get("width", "inf")) <= 860, f"{name} is {root.get('width')} wide: expected at most 860"
    sizes = {float(text.get("font-size", 0)) for text in root.iter(f"{SVG}text")}
    assert min(sizes) >= 12, f"{name} has text of size {min(sizes)}: expected at least 12"


# Text and boxes


@each_diagram
def test_no_text_overlaps_or_sticks_out(name: str) -> None:
    found = problems(DIAGRAMS[name]())
    assert not found, f"{name}:\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("draw", "expected"),
    [
        (lambda d: d.box(Rect(20, 20, 60, 40), "far too wide for its box"), "sticks out"),
        (lambda d: d.text(360, 50, "over the edge of the page"), "outside of the page"),
        (lambda d: (d.text(20, 50, "one text"), d.text(40, 54, "another")), "overlap"),
        (lambda d: (d.text(20, 50, "a text"), d.arrow([(10, 52), (200, 52)])), "a line crosses"),
        (lambda d: (d.text(20, 50, "a text"), d.curve((10, 40), (60, 60))), "a line crosses"),
        (lambda d: (d.box(Rect(20, 20, 60, 40)), d.box(Rect(60, 30, 60, 40))), "overlap"),
        (lambda d: d.box(Rect(-10, 20, 60, 40)), "outside of the page"),
        (lambda d: d.text(20, 50, "small", metrics.Font(11)), "at least 12"),
    ],
)
def test_each_fault_is_found(draw: Callable[[Drawing], object], expected: str) -> None:
    drawing = Drawing("A title", "What it shows.", width=400)
    draw(drawing)
    assert any(expected in problem for problem in problems(drawing)), f"expected {expected!r}, got {problems(drawing)}"


def test_a_good_drawing_has_no_problems() -> None:
    drawing = Drawing("A title", "What it shows.", width=400)
    drawing.panel(Rect(10, 10, 300, 100), "A panel")
    box = drawing.box(Rect(20, 40, 100, 50), "A box", ["with `code`"], "blue")
    drawing.arrow([box.right_center, (200, box.cy)], "label")
    assert problems(drawing) == []


def test_code_is_measured_in_its_own_font() -> None:
    assert metrics.text_width("`abc`", metrics.BODY) == pytest.approx(3 * 0.6 * 12)
    assert metrics.text_width("ab `c`", metrics.BODY) == pytest.approx(13 * (0.556 + 0.556 + 0.278) + 0.6 * 12)
    assert metrics.wrap("one `two three` four", metrics.BODY, 110) == ["one `two three`", "four"]


def test_a_line_through_a_corner_is_found_and_one_beside_it_is_not() -> None:
    rect = Rect(10, 10, 20, 10)
    assert rect.is_crossed_by(((0, 0), (40, 30))) and rect.is_crossed_by(((20, 0), (20, 40)))
    assert not rect.is_crossed_by(((0, 30), (40, 30))) and not rect.is_crossed_by(((10, 0), (10, 40)))


# Colors


@each_diagram
def test_every_variable_and_class_is_defined_in_both_schemes(name: str) -> None:
    svg = DIAGRAMS[name]().svg()
    used = set(re.findall(r"var\(--([\w-]+)\)", svg))
    assert used <= theme.LIGHT.keys(), f"{name}: not defined for light pages: {used - theme.LIGHT.keys()}"
    assert used <= theme.DARK.keys(), f"{name}: not defined for dark pages: {used - theme.DARK.keys()}"
    classes = {word for value in re.findall(r'class="([^"]+)"', svg) for word in value.split()}
    defined = set(re.findall(r"\.([\w-]+)\{", theme.style_sheet()))
    assert classes <= defined, f"{name}: no rule for the classes {classes - defined}"


@pytest.mark.parametrize("colors", [theme.LIGHT, theme.DARK], ids=["light", "dark"])
def test_text_can_be_read_on_every_background(colors: dict[str, str]) -> None:
    fills = [f"{hue}-{shade}" for hue in theme.HUES for shade in ("fill", "strong")]
    pairs = [("ink", fill) for fill in (*fills, "page", "panel")]
    pairs += [(ink, fill) for ink in ("muted", *(f"{hue}-ink" for hue in theme.HUES)) for fill in ("page", "panel")]
    pairs += [("on-accent", f"{hue}-line") for hue in ("blue", "purple", "green", "orange")]
    weak = {pair: contrast(colors[pair[0]], colors[pair[1]]) for pair in pairs}
    weak = {pair: round(ratio, 2) for pair, ratio in weak.items() if ratio < 4.5}
    assert not weak, f"contrast below 4.5: {weak}"


# References


def test_every_referenced_diagram_exists() -> None:
    drawn = {path.stem for path in command.DIRECTORY.glob("*.svg")}
    missing = {f"{page.relative_to(ROOT)}: {name}" for page in pages() for name in references(page) - drawn}
    assert not missing, f"no such file in docs/diagrams: {sorted(missing)}"


def test_every_diagram_is_referenced() -> None:
    if without := [part.name for part in PARTS if not references(part / "README.md")]:
        pytest.skip(f"lessons that do not show diagrams yet: {without}")
    found = set().union(*(references(page) for page in pages()))
    assert not DIAGRAMS.keys() - found, f"no page shows {sorted(DIAGRAMS.keys() - found)}"


def test_a_reference_leads_from_its_page_to_the_file() -> None:
    """Also from a page in a folder of a part, such as worker/kernels/README.md, which has further to go."""
    links = [
        (page, link)
        for page in pages()
        for link in re.findall(r"!\[[^\]]*\]\(([^)\s]*diagrams/[\w.-]+\.svg)\)", page.read_text(encoding="utf-8"))
    ]
    assert any(len(page.relative_to(ROOT).parts) > 2 for page, _ in links), "pages in folders of parts are read, too"
    broken = [f"{page.relative_to(ROOT)}: {link}" for page, link in links if not (page.parent / link).is_file()]
    assert not broken, f"these links lead nowhere: {broken}"


# What they show is what the code does


def test_code_names_in_diagrams_are_in_the_code() -> None:
    sources = [
        *ROOT.glob("part*/**/*.py"),
        *ROOT.glob("common/**/*.py"),
        *ROOT.glob("models/*/config.json"),
        *CUDA_FILES,
    ]
    words = {word for path in sources for word in re.findall(r"\w+", path.read_text(encoding="utf-8"))}
    unknown = {
        f"{name}: {word}"
        for name, draw in DIAGRAMS.items()
        for placed in draw().texts
        if placed.text != kernel_choice.METRIC  # its name is put together, see test_choices_are_those_of_part_15
        for run, font in metrics.split_code(placed.text, placed.font)
        if font.mono
        for word in re.findall(r"[A-Za-z_]{4,}", run)
        if word not in words
    }
    assert not unknown, f"names that the code does not have: {sorted(unknown)}"


def test_the_parts_are_all_there() -> None:
    numbers = [int(part.name[4:6]) for part in PARTS]
    assert sorted(architecture.SUBTITLES) == numbers, "architecture.SUBTITLES: one picture for each part"
    assert max(numbers) == overview.NEWEST_PART, "overview.NEWEST_PART: boxes of later parts are dashed"
    assert all(f"architecture_part{number:02}" in DIAGRAMS for number in numbers)


def test_rows_are_those_of_part_4() -> None:
    demo = (ROOT / "part04_continuous_batching" / "demo.py").read_text(encoding="utf-8")
    assert f"LENGTHS = {batches.LENGTHS}" in demo and f"NUM_ROWS = {batches.NUM_ROWS}" in demo
    static, continuous = batches.fill_rows(is_static=True), batches.fill_rows(is_static=False)
    rows = [["".join("·" if s[i] is None else str(s[i]) for s in h) for i in range(4)] for h in (static, continuous)]
    assert rows[0] == [f"{i}{i}{'·' * 18}{i + 4}{i + 4}{'·' * 18}" for i in range(3)] + ["3" * 20 + "7" * 20]
    assert rows[1] == ["0044" + "7" * 20, "1155" + "·" * 20, "2266" + "·" * 20, "3" * 20 + "·" * 4]


def test_slots_of_the_flat_batch_follow_from_the_block_tables() -> None:
    tables = [*batches.DECODE_TABLES, [6, 8]]
    starts = (0, 1, 2, 3, 8)
    tokens = (*batches.DECODES, *batches.PROMPT)
    for table, (start, end) in zip(tables, pairwise(starts), strict=True):
        for token in tokens[start:end]:
            assert token.slot == table[token.position // 4] * 4 + token.position % 4, f"{token.text}: {table}"


def test_ids_of_the_flat_batch_are_those_of_tiny() -> None:
    tokenizer = json.loads((ROOT / "models" / "tiny" / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    for token in (*batches.DECODES, *batches.PROMPT):
        assert token.token_id == vocabulary["Ġ" * (token.text != "What") + token.text], f"the id of {token.text!r}"


def test_chunks_are_those_of_the_scheduler_of_part_6() -> None:
    """A to D have a token to decode, P and Q arrive; every sampled token lands before the next step is scheduled."""
    scheduler = Scheduler(Part06BlockManager(100, 16), max_num_seqs=8, max_num_batched_tokens=batches.BUDGET)
    params = params_for(100)
    for name in "ABCD":
        scheduler.add_request(Part06Request(name, [7], params, 101))
    scheduler.schedule()
    for request in scheduler.running:
        land(request)
    for name, num_tokens in (("P", 30), ("Q", 20)):
        scheduler.add_request(Part06Request(name, [7] * num_tokens, params, num_tokens + 100))
    for decodes, prompts, note in batches.CHUNK_STEPS:
        output = scheduler.schedule()
        expected = {name: 1 for name in decodes} | {name: num_tokens for name, _, num_tokens in prompts}
        pairs = list(zip(output.requests, output.step.requests, strict=True))
        assert {request.request_id: share.num_scheduled_tokens for request, share in pairs} == expected, note
        first = {request.request_id: share.num_computed_tokens for request, share in pairs}
        assert all(first[name] == position for name, position, _ in prompts), note
        for request, share in pairs:
            if share.is_sampled:
                land(request)


def land(request: Part06Request) -> None:
    request.num_output_placeholders -= 1
    request.output_token_ids.append(9)


def test_blocks_and_free_queue_are_those_of_part_7() -> None:
    blocks, params = BlockManager(num_blocks=11, block_size=16), params_for(1)
    common = list(range(48))
    requests = {"A": Request("A", common + [100] * 7, params, 100), "B": Request("B", common + [200] * 5, params, 100)}
    for name, request in requests.items():
        blocks.admit(name, request.num_tokens, blocks.find_cached(request))
        blocks.cache_full_blocks(request, request.num_tokens)
    assert blocks.block_tables == {name: [*kv_blocks.SHARED, own] for name, own in kv_blocks.OWN.items()}
    for (_, front, middle, back), ended in zip(kv_blocks.FREE_QUEUES, (None, "A", "B"), strict=True):
        if ended:
            blocks.free(ended)
        assert [block.block_id for block in blocks.free_queue] == [*front, *middle, *back], f"after the end of {ended}"
        assert [block.block_id for block in blocks.free_queue if block.block_hash] == back, "those still cached"


def test_the_tables_of_the_block_table_figure() -> None:
    for name, table in kv_blocks.TABLES.items():
        assert len(table) == -(-kv_blocks.NUM_TOKENS[name] // kv_blocks.BLOCK_SIZE), f"the blocks of {name}"
    used = [block_id for table in kv_blocks.TABLES.values() for block_id in table]
    assert len(set(used)) == len(used) and 0 not in used, "no block has two owners, and the null block has none"
    assert kv_blocks.TABLES["A"][9 // 4] * 4 + 9 % 4 == 13, "the worked example: position 9 of request A is slot 13"


def test_the_shapes_are_those_of_tiny() -> None:
    config = json.loads((ROOT / "models" / "tiny" / "config.json").read_text(encoding="utf-8"))
    hidden, vocab, inner = config["hidden_size"], config["vocab_size"], config["intermediate_size"]
    heads, kv_heads, size = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
    assert (heads, kv_heads) == (transformer.NUM_HEADS, transformer.NUM_KV_HEADS)
    assert config["num_hidden_layers"] == transformer.NUM_LAYERS and config["tie_word_embeddings"]
    n = len(transformer.TOKENS)
    shapes = {
        f"[{n}, {hidden}]", f"[{vocab}, {hidden}]", f"[{(heads + 2 * kv_heads) * size}, {hidden}]", f"[1, {vocab}]",
        f"[{hidden}, {heads * size}]", f"[{2 * inner}, {hidden}]", f"[{hidden}, {inner}]", f"[{n}, {inner}]",
        f"[{n}, {heads}, {size}]", f"[{n}, {kv_heads}, {size}]",
    }  # fmt: skip
    shapes_shown = re.findall(r"\[[\d, ]+\]", " ".join(shown("transformer_shapes")))
    found = {shape.replace(" ", "").replace(",", ", ") for shape in shapes_shown}
    assert shapes <= found, f"the figure lacks {shapes - found}"
    layer = hidden * (heads + 2 * kv_heads) * size + hidden * heads * size + 3 * hidden * inner + 2 * hidden
    num_parameters = vocab * hidden + config["num_hidden_layers"] * layer + hidden
    assert f"{4 * num_parameters / 1e6:.1f} MB" == one_request.TINY_WEIGHTS_MB
    kv_bytes = 2 * config["num_hidden_layers"] * kv_heads * size * 4
    assert f"{kv_bytes:,} bytes" == one_request.KV_BYTES_PER_TOKEN
    assert kv_bytes == quantized_layers.kv_bytes(4)


def shown(name: str) -> list[str]:
    return [placed.text for placed in DIAGRAMS[name]().texts]


def test_codes_and_bytes_of_4_bits_are_those_of_part_14() -> None:
    scheme = Scheme(bits=4, group_size=4)
    for group in quantization.EXAMPLE:
        quantized = quantize(torch.tensor(group.numbers), scheme)
        assert quantized.codes.tolist() == list(group.codes)
        assert quantized.scale.tolist() == pytest.approx([group.scale])
        decoded = [quantization.written(value) for value in dequantize(quantized, scheme).tolist()]
        assert decoded == [quantization.written(code * group.scale) for code in group.codes]
        packed = pack_nibbles(quantized.codes, 4).view(torch.uint8).tolist()
        assert packed == [upper << 4 | lower for upper, lower in group.bytes]
        assert all(f"byte {index}: `0x{value:02X}`" in shown("int4_groups") for index, value in enumerate(packed))
    row = quantize(torch.randn(1, 256), Scheme(bits=4, group_size=quantization.GROUP_SIZE))
    code = pack_nibbles(row.codes, quantization.GROUP_SIZE).view(torch.uint8)[0, 64 + 1]  # of group 1, byte 1
    assert {"q65", "q1", "byte 1"} <= set(shown("int4_groups"))
    assert (code >> 4, code & 15) == (row.codes[0, 128 + 65] + 8, row.codes[0, 128 + 1] + 8)


def test_the_two_columns_of_the_gptq_figure() -> None:
    inputs, weights = torch.ones(2), torch.tensor([[0.4, 0.4]])
    nearest, moved = weights.round(), weights.clone()
    spread_error(moved, 0, nearest[:, 0], inverse_factor(torch.outer(inputs, inputs)))
    assert moved[0].tolist() == pytest.approx([0.4, 0.8], abs=0.005)  # less than 0.8, because of the damping
    codes = torch.tensor([[nearest[0, 0], moved[0, 1].round()]])
    errors = [float(((rounded - weights) @ inputs).abs()) for rounded in (nearest, codes)]
    assert (nearest.tolist(), codes.tolist(), errors) == ([[0, 0]], [[0, 1]], pytest.approx([0.8, 0.2]))
    lines = ("0 + 0 = 0 instead of 0.8: error 0.8", "0 + 1 = 1 instead of 0.8: error 0.2")
    assert set(lines) <= set(shown("gptq_step"))


def test_products_are_chosen_as_in_part_14() -> None:
    limits = quantized_layers.KERNEL_ROWS, quantized_layers.INT8PACK_ROWS, quantized_layers.TILE_ROWS
    assert limits == (cpu_kernels.MAX_KERNEL_ROWS, products.MAX_INT8PACK_ROWS, products.TILE_ROWS)


NUM_TOKENS, HIDDEN_SIZE = 3, 256  # of tiny


def layer_config() -> SimpleNamespace:
    config = json.loads((ROOT / "models" / "tiny" / "config.json").read_text(encoding="utf-8"))
    assert config["hidden_size"] == HIDDEN_SIZE, "the unit of the figure is a hidden state of tiny"
    return SimpleNamespace(**config)


def in_hidden_states(tensors: list[Any]) -> float:
    """The size of activations: not of weights, whole caches and tables, which have other first dimensions."""
    own = [
        each
        for each in tensors
        if isinstance(each, Tensor) and len(each) == NUM_TOKENS and each.dtype.is_floating_point
    ]
    return sum(each.numel() for each in own) / (NUM_TOKENS * HIDDEN_SIZE)


class Launches(TorchDispatchMode):
    """Notes (reads, writes), in hidden states, of each of torch's operations that isn't a view."""

    def __init__(self) -> None:
        super().__init__()
        self.found = list[tuple[float, float]]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [each for each in tree_leaves(args) if isinstance(each, Tensor)]
        owners = {each.untyped_storage().data_ptr() for each in tensors}
        if func is torch.ops.aten.index_put_.default:
            self.found.append((in_hidden_states(tensors[1:]), in_hidden_states(tensors[1:])))
        elif isinstance(result, Tensor) and result.untyped_storage().data_ptr() not in owners:
            # cosines and sines have one head, [num_tokens, 1, head_dim / 2]: they are shared by all heads
            self.found.append(
                (in_hidden_states([each for each in tensors if each.shape[1:2] != (1,)]), in_hidden_states([result]))
            )
        return result


def test_small_operations_of_the_fusion_figure_are_those_of_part_14(monkeypatch: pytest.MonkeyPatch) -> None:
    config = layer_config()
    # On a GPU, torch has a kernel for the norm. Attention stays as it is: both are one operation here.
    monkeypatch.setattr(part14_linear.RMSNorm, "forward", lambda norm, hidden: hidden.clone())
    monkeypatch.setattr(part14_attention, "load_backend", lambda *arguments: lambda query, *rest: query.clone())
    layer = part14_model.DecoderLayer(config, 0, 0, part14_parallel.Groups())
    model = SimpleNamespace(num_layers=1, num_kv_heads=4, head_dim=32, device="cpu")
    cache = part14_kv_cache.KVCache(model, 2, 4, Part14KVFormat(torch.float32))  # type: ignore[arg-type]
    slots, unused = torch.arange(NUM_TOKENS), torch.zeros(1)
    metadata = part14_attention.AttentionMetadata(slots, unused, unused, unused, 1)
    attend = part14_attention.PagedAttention(cache, 1.0, "torch").attend
    hidden, cos, sin = (torch.zeros(NUM_TOKENS, *shape) for shape in ((HIDDEN_SIZE,), (1, 16), (1, 16)))
    with torch.inference_mode(), Launches() as launches:
        layer(hidden, cos, sin, lambda *arguments: attend(metadata, *arguments))
    expected = [operation for stage in fusion.STAGES for operation in stage.rows]
    expected = [*expected[1:], expected[0]]  # the figure begins with the add at the end of the layer before
    found = iter(launches.found)
    for operation in expected:
        own = [next(found) for _ in range(operation.launches)]
        sums = sum(reads for reads, _ in own), sum(writes for _, writes in own)
        assert sums == (operation.reads, operation.writes), f"{operation.name}: got {own}"
    assert not list(found), "the figure lacks operations"


def test_fused_operations_of_the_figure_are_those_of_part_15() -> None:
    config, found = layer_config(), list[tuple[str, float, float]]()

    def add_rms_norm(rows: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        found.append(("`add_rms_norm`", in_hidden_states([rows, residual]), in_hidden_states([rows, residual])))
        return rows

    def rotate_and_store(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Tensor:
        size = in_hidden_states([query, key, value])
        found.append(("`rotate_and_store`", size, size))
        return query

    def paged_attention(query: Tensor, *rest: Any) -> Tensor:
        found.append(("attention", in_hidden_states([query]), in_hidden_states([query])))
        return query

    def silu_and_mul(gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        found.append(("`silu_and_mul`", in_hidden_states([gate_up]), in_hidden_states([gate])))
        return up

    kernels = ops.Kernels(
        add_rms_norm=add_rms_norm, rotate_and_store=rotate_and_store, paged_attention=paged_attention,
        silu_and_mul=silu_and_mul,
    )  # fmt: skip
    layer = part15_model.DecoderLayer(config, 0, 0, Groups())
    for module in layer.modules():
        if hasattr(module, "kernels"):
            module.kernels = kernels  # type: ignore[assignment]
    model = SimpleNamespace(num_layers=1, num_kv_heads=4, head_dim=32, device="cpu")
    cache = KVCache(model, 2, 4, KVFormat(torch.float32))  # type: ignore[arg-type]
    attention = PagedAttention(cache, 1.0, kernels)
    positions, unused = torch.arange(NUM_TOKENS), torch.zeros(1)
    metadata = AttentionMetadata(positions, unused, unused, unused, 1)
    hidden, residual = (torch.zeros(NUM_TOKENS, HIDDEN_SIZE) for _ in range(2))
    with torch.inference_mode():
        layer(hidden, residual, part15_model.Rotation(positions, torch.zeros(9, 32)),
              lambda *arguments: attention.attend(metadata, *arguments))  # fmt: skip
    drawn = [stage.after for stage in fusion.STAGES if not stage.after.name.startswith("GEMM")]
    assert [(operation.name, operation.reads, operation.writes) for operation in drawn] == found


def test_tasks_of_the_shared_kernel_are_those_of_part_15() -> None:
    config = resolve_checkpoint("tiny").config
    sizes = config.hidden_size, config.num_attention_heads, config.num_key_value_heads, whole_step.NUM_OUTPUTS
    drawn = team.HIDDEN_SIZE, team.NUM_HEADS, team.NUM_KV_HEADS, team.OUTPUTS_PER_TASK
    assert drawn == sizes and part15_model.head_dim(config) == team.HEAD_DIM
    for number, phase in enumerate(team.PHASES):
        tasks = [task for task in team.schedule() if task.phase == number]
        assert [task.number for task in sorted(tasks, key=lambda each: each.start)] == list(range(phase.num_tasks))
        earlier = [task.end for task in team.schedule() if task.phase < number]
        assert all(task.start >= max(earlier, default=0) - 1e-9 for task in tasks), "phases come one after the other"


def test_the_rows_of_the_padded_step_are_those_of_the_graphs() -> None:
    calls = list[dict[str, Any]]()

    def model(input_ids: Tensor, positions: Tensor, attend: Any) -> Tensor:
        calls.append({"input_ids": input_ids, "positions": positions, **vars(attend.args[0])})
        return input_ids.unsqueeze(1).float()

    model.device = "cpu"  # type: ignore[attr-defined]
    attention = SimpleNamespace(attend=lambda *arguments: None)
    graphs = StepGraphs(model, attention, step_graphs.BUCKETS, step_graphs.MAX_BLOCKS)  # type: ignore[arg-type]
    graphs.capture()
    rows = step_graphs.DECODES
    metadata = AttentionMetadata(
        slot_mapping=torch.tensor([row.slot for row in rows]),
        block_tables=torch.tensor([row.block_table for row in rows], dtype=torch.int32),
        query_start_loc=torch.arange(len(rows) + 1, dtype=torch.int32),
        context_lens=torch.tensor([row.context_len for row in rows], dtype=torch.int32),
        max_query_len=1,
    )
    ids, positions = torch.tensor([row.input_id for row in rows]), torch.tensor([row.position for row in rows])
    hidden = graphs.run(ids, positions, metadata)
    assert hidden is not None and len(hidden) == len(rows), "the rows of padding are dropped"
    drawn = [(row.input_id, row.position, row.slot, list(row.block_table), row.context_len) for row in step_graphs.ROWS]
    names = ("input_ids", "positions", "slot_mapping", "block_tables", "context_lens")
    assert list(zip(*[calls[-1][name].tolist() for name in names], strict=True)) == drawn
    assert "`query_start_loc`: " + " ".join(map(str, calls[-1]["query_start_loc"].tolist())) in shown("padded_step")
    for row in rows:
        slot = row.block_table[row.position // step_graphs.BLOCK_SIZE] * step_graphs.BLOCK_SIZE
        assert row.slot == slot + row.position % step_graphs.BLOCK_SIZE and row.context_len == row.position + 1
    used = [block for row in rows for block in row.block_table if block]
    assert len(set(used)) == len(used), "no block has two owners"
    assert step_graphs.NUM_LAYERS == transformer.NUM_LAYERS
    assert len(step_graphs.LAYER) == len(fusion.STAGES), "the kernels of a layer are those of the fusion figure"


def test_lanes_are_combined_as_in_common_cuh() -> None:
    source = (build.SOURCES / "common.cuh").read_text(encoding="utf-8")
    loop = "for (int offset = WARP / 2; offset > 0; offset /= 2) x = op(x, __shfl_xor_sync(ALL_LANES, x, offset));"
    assert loop in source, "warp_reduce has changed: does the figure still show it?"
    assert gpu.shuffles(gpu.WARP) == [16, 8, 4, 2, 1] and gpu.shuffles(len(gpu.LANES)) == [4, 2, 1]
    numbers = torch.tensor(gpu.LANES)
    drawn = iter(text for text in shown("warp_reduction") if text.isdecimal())
    lanes = torch.arange(len(numbers))
    assert [int(next(drawn)) for _ in lanes] == lanes.tolist()
    assert [int(next(drawn)) for _ in lanes] == numbers.tolist()
    for bit in (4, 2, 1):
        numbers = torch.maximum(numbers, numbers[lanes ^ bit])
        assert [int(next(drawn)) for _ in lanes] == numbers.tolist(), f"after the shuffle with {bit}"
    assert numbers.tolist() == [max(gpu.LANES)] * len(gpu.LANES)


def test_parts_and_weights_of_the_split_context() -> None:
    assert gpu.MIN_PART_LEN == cuda_attention.MIN_PART_LEN
    assert cuda_attention.choose_num_parts(4, gpu.MAX_CONTEXT_LEN, 132) == gpu.NUM_PARTS
    source = (build.SOURCES / "split_kv.cu").read_text(encoding="utf-8")
    assert "max(parts.min_part_len, (int)ceil_div(context_len, parts.num_parts))" in source, "see gpu.part_bounds()"
    assert gpu.part_bounds() == [(0, 128), (128, 200), (200, 200), (200, 200)]
    assert [bounds[0] == bounds[1] for bounds in gpu.part_bounds()] == [state.output is None for state in gpu.STATES]
    outputs = torch.tensor([torch.nan if state.output is None else state.output for state in gpu.STATES])
    log_sums = torch.tensor([state.log_sum for state in gpu.STATES])
    output, total = reference.merge_states(outputs.unsqueeze(1), log_sums)
    assert (float(output), float(total)) == pytest.approx((2.5, 1.386), abs=5e-4)
    lines = {"Output ¼ · 1 + ¾ · 3 = 2.5", "log-sum-exp log(1 + 3) = log 4 = 1.386", "¼", "¾", "log 3", "−∞"}
    assert lines <= set(shown("split_kv"))
    assert gpu.weights() == pytest.approx((log_sums - total).exp().tolist())


def test_choices_are_those_of_part_15() -> None:
    assert {name: functions for name, (functions, _) in ops.OPERATIONS.items()} == kernel_choice.OPERATIONS
    assert ops.PREFERENCE == kernel_choice.CANDIDATES
    assert set(autotune.CASES) == set(kernel_choice.MEASURED), "the operations that are measured on a GPU"
    assert all(set(kernel_choice.CANDIDATES[device]) <= set(ops.BACKENDS) for device in ops.PREFERENCE)
    situation = ops.Situation(torch.device("cpu"), torch.float32, torch.float32, 8, 4, 32, HIDDEN_SIZE, 4096)
    choices = {name: ops.choose(name, "auto", situation, autotune.Tuner()) for name in ops.OPERATIONS}
    assert {choice.backend for choice in choices.values()} == {"numba"}, "the first candidate on a CPU"
    labels = {"operation": "norm", "backend": choices["norm"].backend, "reason": choices["norm"].reason}
    rendered = Metrics(dict, {"kernel_backend": [labels]}).render().decode()
    assert kernel_choice.METRIC in rendered.splitlines() and kernel_choice.METRIC in shown("kernel_choice")
