"""SkyRL's dumps, as train/utils/trainer_utils.py and backends/skyrl_train/training_batch.py write them."""

from __future__ import annotations

import io
import json
import pickle
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

MODULE = "skyrl.backends.skyrl_train.training_batch"


def evaluated(prompt: int, i: int, source: str = "openai/gsm8k", **other: Any) -> dict[str, Any]:
    return {
        "input_prompt": f"<|im_start|>user\nWhat is {prompt}+{prompt}?<|im_end|>\n<|im_start|>assistant\n",
        "output_response": f"prompt {prompt}, sample {i}: #### {2 * prompt + i % 2}<|im_end|>",
        "score": float(1 - i % 2),
        "stop_reason": "length" if i == 3 else "stop",
        "env_class": "gsm8k",
        "env_extras": {"data_source": source, "reward_spec": {"method": "rule", "ground_truth": str(2 * prompt)}},
        "data_source": source,
        **other,
    }


def evals(folder: Path, step: int = 10, prompts: int = 2, n: int = 4, source: str = "openai/gsm8k") -> Path:
    """`dumped_evals/global_step_{N}_evals/{data_source}.jsonl` and the means beside it."""
    path = folder / "dumped_evals" / f"global_step_{step}_evals" / f"{source.replace('/', '_')}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [evaluated(p, i, source) for p in range(prompts) for i in range(n)]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    means = {"eval/all/avg_score": 0.5, f"eval/{path.stem}/pass_at_{n}": 1.0}
    path.with_name("aggregated_results.jsonl").write_text(json.dumps(means) + "\n")
    return path


def tensors(prompts: list[list[int]], responses: list[list[int]], advantages: list[float], pad: int = 0) -> dict[str, Any]:
    """dataset/preprocess.py: [pad] prompt response, flush right; tensors of the response cover the last columns."""
    import torch

    width = max(len(p) + len(r) for p, r in zip(prompts, responses, strict=True))
    longest = max(map(len, responses))

    def right(values: list, size: int, fill: float = 0) -> list:
        return [fill] * (size - len(values)) + values

    def table(rows: list[list], size: int, dtype: Any, fill: float = 0) -> Any:
        return torch.tensor([right(row, size, fill) for row in rows], dtype=dtype)

    pairs = [p + r for p, r in zip(prompts, responses, strict=True)]
    ones = [[1] * len(r) for r in responses]
    return {
        "sequences": table(pairs, width, torch.int64, pad),
        "attention_mask": table([[1] * len(p) for p in pairs], width, torch.int64),
        "response_mask": table(ones, longest, torch.int64),
        "loss_mask": table([[0] + o[1:] for o in ones], longest, torch.float32),
        "rollout_logprobs": table([[-0.5 * (t + 1) for t in range(len(r))] for r in responses], longest, torch.float32),
        "is_last_step": None,
        "base_action_log_probs": None,
        "action_log_probs": table([[-0.25] * len(r) for r in responses], longest, torch.float32),
        "values": None,
        "returns": table([[a] * len(r) for a, r in zip(advantages, responses, strict=True)], longest, torch.float32),
        "advantages": table([[a] * len(r) for a, r in zip(advantages, responses, strict=True)], longest, torch.float32),
    }


def _pack(value: Any, old: bool) -> Any:
    import torch

    if value is None:
        return None
    if old or value.dtype == torch.bfloat16:
        buffer = io.BytesIO()
        torch.save(value, buffer)
        return buffer.getvalue() if old else {"format": "torch", "data": buffer.getvalue()}
    array = value.numpy()
    return {"format": "numpy", "data": array.tobytes(), "shape": array.shape, "dtype": str(array.dtype)}


def training_module(old: bool) -> ModuleType:
    """A stand-in for SkyRL's module, pickling as it does: the old one as a dict with a state, the new one by a function."""
    module = ModuleType("skyrl_train.training_batch" if old else MODULE)

    class TrainingInputBatch(dict):
        metadata: Any = None

        def __getstate__(self) -> dict[str, Any]:
            import torch

            packed = {k: _pack(v, old) for k, v in self.items()}
            return {"batch_dict": packed, "batch_size": len(self["sequences"]), "device": torch.device("cpu")} | {
                "metadata": self.metadata
            }

    def _rebuild_tensor_batch(cls: type, state: dict[str, Any]) -> None:
        raise AssertionError("only its name is used")

    TrainingInputBatch.__module__ = _rebuild_tensor_batch.__module__ = module.__name__
    TrainingInputBatch.__qualname__ = "TrainingInputBatch"
    _rebuild_tensor_batch.__qualname__ = "_rebuild_tensor_batch"
    if not old:
        TrainingInputBatch.__reduce__ = lambda self: (_rebuild_tensor_batch, (type(self), self.__getstate__()))
    module.TrainingInputBatch, module._rebuild_tensor_batch = TrainingInputBatch, _rebuild_tensor_batch  # type: ignore[attr-defined]
    return module


def training_input(path: Path, values: dict[str, Any], metadata: dict[str, Any] | None = None, old: bool = False) -> Path:
    """`TrainingInputBatch.save`. The module is there only as long as it takes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    module = training_module(old)
    batch = module.TrainingInputBatch({k: v for k, v in values.items() if v is not None or not old})
    batch.metadata = {"response_length": values["response_mask"].shape[1], "pad_size": 0, **(metadata or {})}
    names = [".".join(module.__name__.split(".")[: i + 1]) for i in range(module.__name__.count(".") + 1)]
    sys.modules.update({name: ModuleType(name) for name in names} | {module.__name__: module})
    try:
        with path.open("wb") as f:
            pickle.dump(batch, f)
    finally:
        for name in names:
            del sys.modules[name]
    return path


PROMPTS = [[11, 12, 13], [11, 12, 13], [21], [21]]
RESPONSES = [[31, 32], [33, 34, 35, 36], [41, 42, 43], [44]]
ADVANTAGES = [0.5, -0.5, 1.5, -1.5]


def batch() -> dict[str, Any]:
    return tensors(PROMPTS, RESPONSES, ADVANTAGES)


def fixture(folder: Path) -> list[Path]:
    exports = folder / "exports"
    return [evals(exports, 10), evals(exports, 20, source="aime_2024")]
