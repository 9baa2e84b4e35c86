"""EchoRL's dumps, as mix_trainer.py `_save_entropy_data` and compute_golden_entropy.py write them."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PAD, EOS = 90, 91
PROMPT, RESPONSE = 24, 20  # 1024 and 8192 in their scripts
WORDS = {PAD: "<|endoftext|>", EOS: "<|im_end|>"}


def decode(ids: Sequence[int]) -> str:
    """`tokenizer.decode(ids, skip_special_tokens=False)` of a tokenizer with a word for each id."""
    return "".join(WORDS.get(i, f" w{i}") for i in ids)


def npy(path: Path, values: Sequence[float], descr: str = "<f4", shape: str | None = None) -> Path:
    """`numpy.save`, format 1.0, without numpy."""
    header = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape or f'({len(values)},)'}, }}"
    header = header.ljust((len(header) + 11 + 63) // 64 * 64 - 11) + "\n"
    kind = {"<f2": "e", "<f4": "f", "<f8": "d"}.get(descr, "f")
    path.parent.mkdir(parents=True, exist_ok=True)
    body = struct.pack(f"<{len(values)}{kind}", *values)
    path.write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode() + body)
    return path


def entropies(sample: int, n: int) -> list[float]:
    return [0.25 * (int(sample) % 7) + 0.5 * t for t in range(n)]


def trained(sample: int, prompt: Sequence[int], response: Sequence[int], reward: float, step: int, **other: Any) -> dict:
    """One record of the trainer: padded ids, and texts of them."""
    filled = [*response, *[PAD] * (RESPONSE - len(response))]
    whole = [*[PAD] * (PROMPT - len(prompt)), *prompt, *filled]
    return {
        "sample_id": sample,
        "step": step,
        "prompt": decode(whole),
        "response": decode(filled),
        "prompt_ids": whole,
        "response_ids": filled,
        "reward": reward,
        "entropy_tensor_file": None,
        "n": len(response),
        **other,
    }


def document(folder: Path, step: int, records: dict[str, list[dict]], **other: Any) -> Path:
    """`step_<N>/samples.json` and a .npy file a record: as long as its `n`, which is not written."""
    folder = folder / f"step_{step}"
    content: dict[str, Any] = {"step": step}
    for category in ("correct_rollouts", "wrong_rollouts", "golden_trajectories"):
        content[category] = []
        for record in records.get(category, ()):
            record, n = dict(record), record.get("n", len(record["response_ids"]))
            record.pop("n", None)
            if record.get("entropy_tensor_file", "") is None:
                record["entropy_tensor_file"] = f"{category}_tensors/sample_{record['sample_id']}_entropy.npy"
                npy(folder / record["entropy_tensor_file"], entropies(record["sample_id"], n))
            content[category].append(record)
    content["stats"] = {c: {"count": len(content[c])} for c in content if c != "step"}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "samples.json").write_text(json.dumps({**content, **other}, indent=2, ensure_ascii=False))
    return folder / "samples.json"


def records(prompts: int = 2, n: int = 4, step: int = 10, first: int = 0) -> dict[str, list[dict]]:
    """Two steps of a save: all samples since the last one. Odd samples are wrong."""
    found: dict[str, list[dict]] = {"correct_rollouts": [], "wrong_rollouts": []}
    sample = first
    for s in (step - 1, step):
        for p in range(prompts):
            for i in range(n):
                response = [40 + t + i for t in range(3 + i)] + [EOS]
                record = trained(sample, [10, 11 + p, 12 + s], response, float(1 - i % 2), s)
                found["wrong_rollouts" if i % 2 else "correct_rollouts"].append(record)
                sample += 1
    return found


def trainer(folder: Path, step: int = 10, latest: bool = True, **options: Any) -> Path:
    path = document(folder, step, records(step=step, **options))
    if latest:
        shutil.copytree(path.parent, folder / "latest", dirs_exist_ok=True)
    return path


def golden_records(n: int = 3, step: int = 0) -> list[dict]:
    texts = ["<|im_start|>user\nWhat?", "What?", "[{'content': 'What?', 'role': 'user'}]"]
    return [
        {
            "sample_id": 10 * i,
            "step": step,
            "prompt": texts[i % 3],
            "response": f"Because {i}.",
            "prompt_ids": [50, 51 + i],
            "response_ids": [60 + t for t in range(i + 2)],
            "reward": None,
            "entropy_tensor_file": f"golden_trajectories_tensors/sample_{10 * i}_entropy.npy",
        }
        for i in range(n)
    ]


def golden(folder: Path, n: int = 3, step: int = 0, finished: bool = True) -> Path:
    """The golden script: lines as it goes, then all of them again as samples.json."""
    rows = golden_records(n, step)
    lines = folder / f"step_{step}" / "samples.jsonl"
    for row in rows:
        npy(lines.parent / row["entropy_tensor_file"], entropies(row["sample_id"], len(row["response_ids"])))
    lines.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return document(folder, step, {"golden_trajectories": rows}) if finished else lines


def fixture(folder: Path) -> list[Path]:
    return [trainer(folder / "entropy_data"), golden(folder / "golden_entropy")]
