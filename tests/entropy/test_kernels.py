"""The Triton kernel, run by Triton's interpreter on the CPU, against float64 and against the tiles of the CPU path."""

from __future__ import annotations

import math
import os

import pytest

torch = pytest.importorskip("torch")
if torch.cuda.is_available():
    DEVICE = "cuda"
else:
    DEVICE = "cpu"
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when the kernel's module is imported
pytest.importorskip("triton", reason="triton is not installed: pip install 'echolab[kernels]'")

from echolab.entropy import head as module  # noqa: E402
from echolab.entropy import kernels  # noqa: E402
from echolab.entropy.head import Head  # noqa: E402


def stats(logits, targets, sharpness, scale=1.0, softcap=None):
    given = [t.to(DEVICE) for t in (logits, targets, sharpness)]
    state = module._State(*(s.cpu() for s in kernels.scan(given[0], given[1], given[2], scale, softcap, True)))
    return state, *module._finish(state, sharpness)


@pytest.mark.parametrize("vocabulary", [1000, 4097, 9001])  # a block, one column more, a ragged third block
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_that_broke_other_kernels(vocabulary, dtype):
    g = torch.Generator().manual_seed(0)
    x = (torch.randn(9, vocabulary, generator=g) * 5).to(dtype)
    x[1], x[2], x[3, 5:], x[4, :-1], x[6] = -200, -1e4, -math.inf, -math.inf, x[6] * 20
    x[5, 0], x[5, -1] = 60, 60  # a tie of the first and the last column
    x[7], x[8, 3] = -math.inf, math.nan
    targets = torch.tensor([0, 1, 2, 3, vocabulary - 1, 0, 9, 0, 0])
    sharpness = torch.linspace(0.5, 2, 9)
    state, entropy, logprob = stats(x, targets, sharpness)
    assert entropy[7:].isnan().all()  # no distribution
    state = module._State(*(s[:7] for s in state))
    x, targets, sharpness, entropy, logprob = x[:7], targets[:7], sharpness[:7], entropy[:7], logprob[:7]
    z = x.double() * sharpness.double()[:, None]
    logp = z.log_softmax(-1)
    expected = -torch.where(logp.exp() > 0, logp.exp() * logp, 0).sum(-1)
    torch.testing.assert_close(entropy.double(), expected, atol=5e-6, rtol=2e-7)
    torch.testing.assert_close(logprob.double(), logp.gather(1, targets[:, None])[:, 0], atol=5e-6, rtol=2e-7)
    first, second = x.float().topk(2).values.T
    assert torch.equal(state.top, first)
    assert torch.equal(state.second, second)
    assert state.rank.tolist() == (x > x.gather(1, targets[:, None])).sum(-1).tolist()


@pytest.mark.parametrize("softcap", [None, 6.0])
def test_chunks_of_rows_give_what_the_tiles_give(monkeypatch, softcap):
    """The path that CUDA takes, from hidden states on, against the path of the CPU."""
    monkeypatch.setattr(module, "CUDA_ROWS", 4)
    g = torch.Generator().manual_seed(0)
    head = Head(torch.randn(5001, 16, generator=g), torch.linspace(-1, 1, 5001), softcap, 0.5)
    states, targets = torch.randn(10, 16, generator=g), torch.randint(0, 5001, (10,), generator=g)
    expected = module._scan_tiles(module._Work.of(states, head, targets, torch.linspace(0.5, 2, 10)), True, False)
    on = Head(head.weight.to(DEVICE), torch.linspace(-1, 1, 5001, device=DEVICE), softcap, 0.5)
    work = module._Work.of(states.to(DEVICE), on, targets.to(DEVICE), torch.linspace(0.5, 2, 10))
    found = module._scan_rows(work, kernels, True)
    for name, a, b in zip(found._fields, found, expected, strict=True):
        torch.testing.assert_close(a.cpu().float(), b, atol=2e-4 if name == "weighted" else 1e-5, rtol=1e-5, msg=name)
