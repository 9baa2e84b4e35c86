"""The entropy head against float64 over the full logits, on random rows and on the rows that broke others' kernels."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest

torch = pytest.importorskip("torch")

from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from echolab.entropy import head as module  # noqa: E402
from echolab.entropy.head import Head, token_logprobs, token_stats  # noqa: E402
from echolab.errors import EcholabError  # noqa: E402


def random(tokens: int, vocabulary: int, hidden: int = 64, spread: float = 3.0, dtype=torch.float32):
    g = torch.Generator().manual_seed(vocabulary)
    states = torch.randn(tokens, hidden, generator=g)
    weight = torch.randn(vocabulary, hidden, generator=g) * (spread / hidden**0.5)
    return states.to(dtype), weight.to(dtype), torch.randint(0, vocabulary, (tokens,), generator=g)


def of_logits(logits):
    """Hidden states and weight whose product is exactly these logits."""
    return torch.eye(len(logits), dtype=logits.dtype), Head(logits.T.contiguous())


def exact(logits, targets, temperature=1.0):
    """Entropy and log-probability in float64 by log_softmax."""
    logp = (logits.double() / torch.as_tensor(temperature).double().reshape(-1, 1)).log_softmax(-1)
    p = logp.exp()
    return -torch.where(p > 0, p * logp, 0).sum(-1), logp.gather(1, targets[:, None])[:, 0]


def full(states, head, dtype=torch.float64):
    """All logits at once, the way the models write it."""
    logits = states.to(dtype) @ head.weight.to(dtype).T
    if head.bias is not None:
        logits = logits + head.bias.to(dtype)
    logits = logits * head.scale
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


def margin_and_rank(*call):
    stats = token_stats(*call, extras=True)
    assert stats.margin is not None
    assert stats.rank is not None
    return stats.margin, stats.rank


def close(found, expected, atol=1e-5):
    torch.testing.assert_close(found.double(), expected, atol=atol, rtol=2e-7)


@pytest.mark.parametrize("vocabulary", [1000, 32_003, 129_920, 151_936])
def test_float32_agrees_with_float64(vocabulary):
    states, weight, targets = random(24, vocabulary)
    stats = token_stats(states, Head(weight), targets)
    entropy, logprob = exact(full(states, Head(weight)), targets)
    assert stats.entropy.dtype == torch.float32
    close(stats.entropy, entropy)
    close(stats.logprob, logprob)


@pytest.mark.parametrize("vocabulary", [1000, 32_003, 129_920, 151_936])
def test_bfloat16_is_five_times_closer_than_log_softmax_on_bfloat16_logits(vocabulary):
    """Logits of ordinary spread. Where they reach 20 and more, their own rounding in the matmul is most of the error."""
    states, weight, targets = random(24, vocabulary, spread=1.5, dtype=torch.bfloat16)
    entropy, _ = exact(full(states, Head(weight)), targets)
    ours = (token_stats(states, Head(weight), targets).entropy - entropy).abs().mean()
    logp = (states @ weight.T).log_softmax(-1)
    theirs = (-(logp.exp() * logp).sum(-1) - entropy).abs().mean()
    assert ours <= 1e-2
    assert theirs >= 5 * ours


@pytest.mark.parametrize("spread", [0.5, 4.8, 20.0])
def test_bfloat16_loses_nothing_after_the_matmul(spread):
    logits = (torch.randn(12, 32_003, generator=torch.Generator().manual_seed(0)) * spread).bfloat16()
    states, head = of_logits(logits)
    stats = token_stats(states, head, torch.arange(12))
    entropy, logprob = exact(logits, torch.arange(12))
    close(stats.entropy, entropy)
    close(stats.logprob, logprob)


@pytest.mark.parametrize("vocabulary", [1000, 8193, 20_000])
def test_peaked_flat_and_very_negative_rows(vocabulary):
    g = torch.Generator().manual_seed(0)
    noise = torch.randn(vocabulary, generator=g)
    peaked, late, two = -200 * torch.ones(3, vocabulary)
    peaked[3], late[-1], two[0], two[-1] = 90, 90, 5, 5
    rows = [
        torch.zeros(vocabulary),
        noise - 200,
        noise.round() - 1e4,
        noise * 0 - 1e4,
        peaked,
        late,
        two,
        noise * 30,
        noise + 1e4,
    ]
    logits = torch.stack(rows)
    states, head = of_logits(logits)
    for target in (0, 3, vocabulary - 1):
        targets = torch.full((len(rows),), target)
        stats = token_stats(states, head, targets)
        entropy, logprob = exact(logits, targets)
        close(stats.entropy, entropy)
        close(stats.logprob, logprob)
        assert (stats.entropy >= 0).all()


def test_infinite_logits_have_no_part_in_the_distribution():
    """Also where a whole tile has none, and where all but one are masked."""
    states, weight, _ = random(6, 20_000)
    for masked in (slice(0, 9000), slice(9000, None), slice(5, None, 2), slice(1, None)):
        bias = torch.zeros(20_000)
        bias[masked] = -math.inf
        head = Head(weight, bias)
        allowed, forbidden = int((bias == 0).nonzero()[0]), int(bias.isinf().nonzero()[0])
        stats = token_stats(states, head, torch.full((6,), allowed))
        entropy, logprob = exact(full(states, head), torch.full((6,), allowed))
        close(stats.entropy, entropy)
        close(stats.logprob, logprob)
        assert (token_stats(states, head, torch.full((6,), forbidden)).logprob == -math.inf).all()
    assert margin_and_rank(states, head, torch.zeros(6, dtype=torch.long))[0].isinf().all()  # the last mask leaves one token
    nothing = Head(weight, torch.full((20_000,), -math.inf))
    assert token_stats(states, nothing, torch.zeros(6, dtype=torch.long)).entropy.isnan().all()


def test_a_broken_row_stays_alone():
    states, weight, targets = random(4, 9000)
    expected = token_stats(states, Head(weight), targets)
    states[2, 0] = math.nan
    found = token_stats(states, Head(weight), targets)
    assert found.entropy.isnan().tolist() == [False, False, True, False]
    keep = [0, 1, 3]
    torch.testing.assert_close(found.entropy[keep], expected.entropy[keep])


@pytest.mark.parametrize("temperature", [0.6, torch.linspace(0.3, 2.0, 12)])
@pytest.mark.parametrize("softcap", [None, 10.0])
def test_scale_bias_cap_and_temperature_in_the_order_of_the_models(softcap, temperature):
    states, weight, targets = random(12, 9001)
    head = Head(weight, torch.linspace(-2, 2, 9001), softcap, 0.5)
    stats = token_stats(states, head, targets, temperature)
    margin, rank = margin_and_rank(states, head, targets, temperature)
    logits = full(states, head)
    entropy, logprob = exact(logits, targets, temperature)
    close(stats.entropy, entropy)
    close(stats.logprob, logprob)
    first, second = (logits / torch.as_tensor(temperature).double().reshape(-1, 1)).topk(2).values.T
    close(margin, first - second)
    assert rank.tolist() == (logits > logits.gather(1, targets[:, None])).sum(-1).tolist()


def test_margin_and_rank_with_ties_and_from_one_tile_to_the_next():
    logits = torch.zeros(5, 20_000)
    logits[0, [7, 19_999]] = torch.tensor([4.0, 3.0])
    logits[1, [7, 19_999]] = torch.tensor([3.0, 4.0])
    logits[2, [7, 9]] = 4.0  # a tie within a tile
    logits[3, [7, 19_999]] = 4.0  # a tie across tiles
    states, head = of_logits(logits)
    margin, rank = margin_and_rank(states, head, torch.tensor([7, 7, 9, 19_999, 5]))
    assert margin.tolist() == [1, 1, 0, 0, 0]
    assert rank.tolist() == [0, 1, 0, 0, 0]
    assert margin_and_rank(states, head, torch.tensor([5] * 5))[1].tolist() == [2, 2, 2, 2, 0]


def test_the_top_token_has_rank_0_even_where_another_is_equal():
    """Its logit is computed twice, by two matmuls that may differ in the last bit."""
    states, weight, _ = random(64, 500, hidden=896)
    twice = torch.cat([weight, weight])
    assert (margin_and_rank(states, Head(twice), (states @ twice.T).argmax(-1))[1] == 0).all()


def test_neither_the_order_of_the_rows_nor_the_size_of_the_pieces_matters(monkeypatch):
    states, weight, targets = random(150, 3001)
    whole = token_stats(states, Head(weight), targets, extras=True)
    order = torch.randperm(150, generator=torch.Generator().manual_seed(1))
    shuffled = token_stats(states[order], Head(weight), targets[order], extras=True)
    monkeypatch.setattr(module, "TILE", 128)
    monkeypatch.setattr(module, "PASS", 128 * 64)
    monkeypatch.setattr(module, "BLOCK", 128 * 5)
    pieces = token_stats(states, Head(weight), targets, extras=True)
    for a, b, c in zip(whole, shuffled, pieces, strict=True):
        assert a is not None
        assert b is not None
        torch.testing.assert_close(a[order], b)
        torch.testing.assert_close(a, c, atol=5e-6, rtol=0)


class Largest(TorchDispatchMode):
    """The largest tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


def test_no_tensor_of_tokens_by_vocabulary_is_made():
    states, weight, targets = random(1024, 16_000, hidden=8)
    weight.requires_grad_()
    with Largest() as largest:
        token_stats(states, Head(weight), targets, extras=True)
        logprob, entropy = token_logprobs(states, Head(weight), targets, entropy_grad=True)
        (logprob.sum() + entropy.sum()).backward()
    assert largest.elements <= module.PASS < 1024 * 16_000 / 3


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"targets": torch.tensor([0, 1, 50])}, "token ids must be 0..49, got 0..50"),
        ({"targets": torch.tensor([0, -1, 4])}, "got -1..4"),
        ({"targets": torch.tensor([0, 1])}, "for each of 3 rows"),
        ({"hidden": torch.zeros(3, 9)}, "do not fit"),
        ({"hidden": torch.zeros(3, 8, dtype=torch.bfloat16)}, "torch.bfloat16, the output matrix is torch.float32"),
        ({"temperature": 0.0}, "above 0"),
        ({"temperature": torch.tensor([1.0, math.nan, 1.0])}, "above 0"),
        ({"temperature": torch.ones(2)}, "one for each row"),
    ],
)
def test_nonsense_is_refused(change, says):
    call = {"hidden": torch.zeros(3, 8), "head": Head(torch.zeros(50, 8)), "targets": torch.tensor([0, 1, 2])} | change
    for f in (token_stats, token_logprobs):
        with pytest.raises(ValueError, match=says):
            f(**call)


def test_no_rows():
    states, weight, targets = random(0, 100)
    assert [len(s) for s in margin_and_rank(states, Head(weight), targets)] == [0, 0]


# Gradients.


@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("entropy_grad", [False, True])
def test_gradcheck(monkeypatch, softcap, entropy_grad):
    monkeypatch.setattr(module, "TILE", 64)
    states, weight, targets = random(3, 70, hidden=2, dtype=torch.float64)
    bias = torch.linspace(-1, 1, 70, dtype=torch.float64)
    inputs = [t.requires_grad_() for t in (states, weight, bias)]

    def call(states, weight, bias):
        head = Head(weight, bias, softcap, 0.7)
        found = token_logprobs(states, head, targets, torch.linspace(0.5, 2, 3), entropy_grad=entropy_grad)
        return found if entropy_grad else found[0]

    assert torch.autograd.gradcheck(call, inputs)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("softcap", [None, 10.0])
def test_gradients_are_those_of_the_full_logits(monkeypatch, dtype, tolerance, softcap):
    """Several tiles and several chunks of rows; the reference is autograd in float64 from the same numbers."""
    monkeypatch.setattr(module, "PASS", 64 * module.TILE)
    states, weight, targets = random(150, 9001, dtype=dtype)
    bias = torch.linspace(-1, 1, 9001).to(dtype)
    ours = [t.clone().requires_grad_() for t in (states, weight, bias)]
    theirs = [t.double().requires_grad_() for t in (states, weight, bias)]
    mix = torch.linspace(-1, 1, 150)
    logprob, entropy = token_logprobs(ours[0], Head(ours[1], ours[2], softcap), targets, 0.8, entropy_grad=True)
    (logprob * mix + 0.3 * entropy * mix.flip(0)).sum().backward()
    expected = exact(full(theirs[0], Head(theirs[1], theirs[2], softcap)), targets, 0.8)
    (expected[1] * mix + 0.3 * expected[0] * mix.flip(0)).sum().backward()
    for a, b in zip(ours, theirs, strict=True):
        assert a.grad.dtype == dtype
        assert (a.grad - b.grad).norm() <= tolerance * b.grad.norm()


def test_scoring_and_training_see_the_same_numbers():
    states, weight, targets = random(40, 9001)
    stats = token_stats(states, Head(weight), targets, 0.7)
    logprob, entropy = token_logprobs(states.requires_grad_(), Head(weight), targets, 0.7)
    assert torch.equal(stats.logprob, logprob)
    assert torch.equal(stats.entropy, entropy)
    assert logprob.requires_grad
    assert not entropy.requires_grad


def test_what_is_frozen_gets_no_gradient():
    states, weight, targets = random(4, 100)
    token_logprobs(states.requires_grad_(), Head(weight), targets)[0].sum().backward()
    assert states.grad is not None
    assert weight.grad is None


def test_autocast_runs_the_matmul_in_its_dtype_and_gives_gradients_to_float32_parameters():
    states, weight, targets = random(30, 9001)
    low = token_stats(states.bfloat16(), Head(weight.bfloat16()), targets)
    ours = [t.clone().requires_grad_() for t in (states, weight)]
    theirs = [t.clone().requires_grad_() for t in (states, weight)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        stats = token_stats(ours[0], Head(ours[1]), targets)
        logprob, _ = token_logprobs(ours[0], Head(ours[1]), targets)
    logprob.sum().backward()
    exact(full(theirs[0], Head(theirs[1])), targets)[1].sum().backward()
    assert torch.equal(stats.entropy, low.entropy)
    assert torch.equal(logprob, low.logprob)
    for a, b in zip(ours, theirs, strict=True):
        assert a.grad.dtype == torch.float32
        assert (a.grad - b.grad).norm() <= 2e-2 * b.grad.norm()


# Models.


def models():
    transformers = pytest.importorskip("transformers")
    small = {
        "vocab_size": 301, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    t = transformers
    return {
        "tied": (t.Qwen2ForCausalLM, t.Qwen2Config(**small, tie_word_embeddings=True)),
        "untied": (t.Qwen3ForCausalLM, t.Qwen3Config(**small, tie_word_embeddings=False)),
        "bias": (t.PhiForCausalLM, t.PhiConfig(**{**small, "num_key_value_heads": 2})),
        "gemma2": (t.Gemma2ForCausalLM, t.Gemma2Config(**small, final_logit_softcapping=3.0)),
        "gemma3": (t.Gemma3ForCausalLM, t.Gemma3TextConfig(**small, final_logit_softcapping=3.0)),
        "cohere": (t.CohereForCausalLM, t.CohereConfig(**small, logit_scale=0.25)),
        "granite": (t.GraniteForCausalLM, t.GraniteConfig(**small, logits_scaling=4.0)),
    }


@pytest.mark.parametrize("name", ["tied", "untied", "bias", "gemma2", "gemma3", "cohere", "granite"])
def test_the_head_of_a_model_gives_the_models_distribution(name):
    kind, config = models()[name]
    torch.manual_seed(0)
    model = kind(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.3)  # so that caps and scales matter
        head, ids = Head.of(model), torch.arange(3, 15)[None]
        head.check(model)
        states = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]
        logits = model(input_ids=ids, use_cache=False).logits[0]
    stats = token_stats(states[:-1], head, ids[0, 1:], 0.9)
    entropy, logprob = exact(logits[:-1], ids[0, 1:], 0.9)
    close(stats.entropy, entropy, 2e-5)
    close(stats.logprob, logprob, 2e-5)
    with pytest.raises(EcholabError, match="in a way that echolab does not know"):
        Head(head.weight, head.bias, head.softcap, head.scale * 1.3).check(model)


# The compiler.


COMPILED = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from echolab.entropy import head as module
from echolab.entropy.head import Head, token_stats
g = torch.Generator().manual_seed(0)
for dtype in (torch.float32, torch.bfloat16):
    for softcap in (None, 10.0):
        states = (torch.randn(70, 64, generator=g) * 0.5).to(dtype)
        head = Head(torch.randn(20_011, 64, generator=g).to(dtype), None, softcap)
        head.weight[5] = -float("inf") if softcap is None and dtype == torch.float32 else 1
        states[:, 1:] = states[:, 1:].abs() if softcap is None else states[:, 1:]
        states[:, 0] = 1
        targets = torch.randint(6, 20_011, (70,), generator=g)
        pairs = zip(*(token_stats(states, head, targets, 0.7, extras=True, compiled=c) for c in (False, True)))
        difference = max(float((a - b).abs().max()) for a, b in pairs)
        print(difference, module._fused(dtype, softcap is not None) is module._reduce)
"""


@pytest.mark.slow
@pytest.mark.parametrize("compiler", ["g++", "a-compiler-that-is-not-there"])
def test_compiled_and_eager_agree_and_a_missing_compiler_is_no_error(compiler, tmp_path):
    if compiler == "g++" and subprocess.run(["which", "g++"], capture_output=True).returncode:
        pytest.skip("no g++ here")
    environment = os.environ | {"CXX": compiler, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    root = str(module.__file__).rsplit("/echolab/", 1)[0]
    done = subprocess.run([sys.executable, "-c", COMPILED, root], capture_output=True, text=True, env=environment, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    for line in done.stdout.splitlines():
        difference, eager = line.split()
        assert float(difference) <= 1e-5
        assert eager == str(compiler != "g++")
    assert ("runs uncompiled" in done.stderr) == (compiler != "g++")
