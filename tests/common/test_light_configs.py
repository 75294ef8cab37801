"""A config is read without the code of models, which can be imported later."""

from __future__ import annotations

import subprocess
import sys

from tests.process_checks import ROOT, environment

LOOK = "Look at common/light_configs.py."
READ = """
import sys
from common.checkpoint import load_model, load_tokenizer, resolve_checkpoint
for name in ("tiny", "tiny-moe", "random:qwen3-0.6b"):
    load_tokenizer(resolve_checkpoint(name))
heavy = ("transformers.activations", "transformers.modeling_utils", "torch._dynamo", "sympy")
print([name for name in heavy if name in sys.modules])
import torch
print(load_model(resolve_checkpoint("tiny"), torch.float32, "cpu").model.layers[0].mlp.act_fn)
"""


def test_a_config_is_read_without_the_code_of_models() -> None:
    done = subprocess.run([sys.executable, "-c", READ], cwd=ROOT, env=environment(), capture_output=True, text=True)
    expected = ["[]", "SiLUActivation()"]
    assert done.stdout.splitlines() == expected, f"expected {expected}, got {done.stdout}{done.stderr}. {LOOK}"
