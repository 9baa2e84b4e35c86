"""The sampler against transformers' own, against scoring, and against float64; in whatever company a row is sampled."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="sampling needs torch")
pytest.importorskip("transformers", reason="sampling needs transformers")

from generators import models  # noqa: E402
from transformers.generation.logits_process import TopKLogitsWarper, TopPLogitsWarper  # noqa: E402

from echolab.engines import Samples, Sampling, lean, torch_engine  # noqa: E402
from echolab.engines.draw import draw, row_keys, uniforms  # noqa: E402
from echolab.engines.torch_engine import TorchEngine  # noqa: E402
from echolab.entropy import packed  # noqa: E402
from echolab.entropy.batching import Sample  # noqa: E402
from echolab.entropy.scorer import Scorer, ScorerConfig  # noqa: E402
from echolab.errors import EcholabError, WrongUsage  # noqa: E402


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    root, made = tmp_path_factory.mktemp("models"), {}

    def get(architecture: str = "qwen3", **options) -> Scorer:
        if architecture not in made:
            made[architecture] = models.model(root / architecture, architecture)
        return Scorer.load(ScorerConfig.make(model=str(made[architecture]), **options))

    return get


def prompts(lengths: tuple[int, ...] = (5, 17, 17, 30, 3), seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(400) for _ in range(n)] for n in lengths]


def engine(scorer: Scorer, **options: Any) -> TorchEngine:
    return TorchEngine(scorer.model, scorer.eos, **options)


def same(a: Samples, b: Samples) -> bool:
    return (a.prompt_ids, a.completion_ids, a.finish_reason) == (b.prompt_ids, b.completion_ids, b.finish_reason)


def flat(arrays: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(arrays)


def theirs(model: Any, asked: list[list[int]], tokens: int, eos: Any) -> list[list[int]]:
    """Greedy completions by transformers, up to the first token that ends them."""
    width = max(map(len, asked))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in asked])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in asked])
    options = {"do_sample": False, "max_new_tokens": tokens, "eos_token_id": list(eos), "pad_token_id": 0}
    rows = model.generate(ids, attention_mask=mask, **options)[:, width:].tolist()
    ends = [next((i + 1 for i, t in enumerate(row) if t in eos), tokens) for row in rows]
    return [row[:end] for row, end in zip(rows, ends, strict=True)]


@pytest.mark.parametrize("architecture", models.ARCHITECTURES)
def test_greedy_sampling_gives_what_transformers_generates(load, architecture):
    scorer, asked = load(architecture), prompts()
    free = engine(scorer).sample(asked, 1, Sampling(temperature=0, max_tokens=40), seed=0)
    assert free.completion_ids == theirs(scorer.model, asked, 40, scorer.eos)
    ends = sorted({row[12] for row in free.completion_ids} | set(scorer.eos))  # so that rows end at different places
    made = TorchEngine(scorer.model, ends).sample(asked, 1, Sampling(temperature=0, max_tokens=40), seed=0)
    assert made.completion_ids == theirs(scorer.model, asked, 40, ends)
    assert [r == "stop" for r in made.finish_reason] == [row[-1] in ends for row in made.completion_ids]
    assert "stop" in made.finish_reason


@pytest.mark.parametrize(
    ("architecture", "options"), [*((a, {}) for a in models.ARCHITECTURES), ("qwen3", {"top_k": 20, "top_p": 0.9})]
)
def test_the_numbers_are_those_of_scoring(load, architecture, options):
    scorer = load(architecture, temperature=0.7)
    made = engine(scorer).sample(prompts(), 4, Sampling(temperature=0.7, max_tokens=30, **options), seed=1)
    asked = [Sample(i, tuple(p), tuple(c)) for i, (p, c) in enumerate(zip(made.prompt_ids, made.completion_ids, strict=True))]
    scored = scorer.numbers(asked)
    for i, sample in enumerate(asked):
        entropies, logprobs = (x.numpy() for x in scored[i])
        assert len(made.entropies[i]) == len(sample.completion) == len(made.logprobs[i])
        np.testing.assert_allclose(made.entropies[i], entropies, rtol=0, atol=2e-5)
        np.testing.assert_allclose(made.logprobs[i], logprobs, rtol=0, atol=2e-5)


@pytest.mark.parametrize("architecture", ["qwen3", "gemma3", "gpt_neox"])
def test_a_rollout_does_not_depend_on_what_else_is_sampled(load, architecture):
    scorer, asked, sampling = load(architecture), prompts((5, 17, 17, 30, 3)), Sampling(max_tokens=25)
    whole = engine(scorer).sample(asked, 4, sampling, seed=3)
    assert len({tuple(c) for c in whole.completion_ids}) > 16
    for rows in (3, 9):
        assert same(engine(scorer, rows=rows).sample(asked, 4, sampling, seed=3), whole)
    assert same(engine(scorer, cache_bytes=1).sample(asked, 4, sampling, seed=3), whole)
    few = engine(scorer).sample([asked[4], asked[1]], 2, sampling, seed=3, keys=[4, 1])
    assert few.completion_ids == [whole.completion_ids[i] for i in (16, 17, 4, 5)]
    assert not same(engine(scorer).sample(asked, 4, sampling, seed=4), whole)


def test_the_seed_the_prompts_key_and_the_sample_all_count(load):
    scorer, [asked] = load(), prompts((9,))
    made = engine(scorer).sample([asked, asked, asked], 3, Sampling(max_tokens=20), seed=0, keys=["a", "b", "a"])
    a, b, again = (made.completion_ids[i : i + 3] for i in (0, 3, 6))
    assert a == again and len({tuple(c) for c in a + b}) == 6


@pytest.mark.parametrize("architecture", models.ARCHITECTURES)
def test_the_short_way_and_fixed_shapes_give_what_the_models_own_forward_does(load, architecture, monkeypatch):
    scorer, sampling = load(architecture), Sampling(max_tokens=25)
    if architecture == "mistral":
        scorer.model.config.sliding_window = None
    ours = engine(scorer, rows=8).sample(prompts(), 4, sampling, seed=5)
    assert lean.fits(scorer.model, 100) == (architecture in ("qwen2", "qwen3", "llama", "mistral"))
    assert same(engine(scorer, rows=8, fixed=True).sample(prompts(), 4, sampling, seed=5), ours)
    monkeypatch.setattr(lean, "FUSED_BYTES", 0)
    apart = engine(scorer, rows=8).sample(prompts(), 4, sampling, seed=5)
    monkeypatch.setattr(lean, "MODELS", ())
    own = engine(scorer, rows=8).sample(prompts(), 4, sampling, seed=5)
    assert same(apart, ours) and same(own, ours)
    np.testing.assert_allclose(flat(own.logprobs), flat(ours.logprobs), rtol=0, atol=2e-5)


def test_a_window_shorter_than_the_rows_is_left_to_the_model(load):
    model = load("mistral").model
    assert lean.fits(model, 24) and not lean.fits(model, 25)


@pytest.mark.parametrize("fixed", [False, True])
def test_rows_that_ended_leave_and_nothing_else_changes(load, fixed, monkeypatch):
    scorer, asked = load(), prompts()
    ends = list(range(0, 451, 9))  # a row ends after nine tokens or so
    rows = []
    step = lean.Lean.step

    def spy(self: Any, tokens: Any, *rest: Any) -> Any:
        rows.append(len(tokens))
        return step(self, tokens, *rest)

    monkeypatch.setattr(lean.Lean, "step", spy)
    sampler = TorchEngine(scorer.model, ends, fixed=fixed)
    made = sampler.sample(asked, 8, Sampling(max_tokens=60), seed=0)
    lengths = sorted(map(len, made.completion_ids))
    assert lengths[0] < 5 and lengths[-1] > 20
    assert sorted(rows, reverse=True) == rows and rows[0] > 25 and rows[-1] <= 2
    assert sum(rows) < 1.1 * sum(lengths)
    monkeypatch.setitem(torch_engine.LEAVE, "cpu", 2.0)
    assert same(sampler.sample(asked, 8, Sampling(max_tokens=60), seed=0), made)
    monkeypatch.setitem(torch_engine.LOOK_EVERY, "cpu", 8)
    monkeypatch.setitem(torch_engine.LEAVE, "cpu", 0.5)
    assert same(sampler.sample(asked, 8, Sampling(max_tokens=60), seed=0), made)


@pytest.mark.parametrize("budget", [4096, 40])
def test_a_prompt_goes_through_the_model_once(load, budget, monkeypatch):
    monkeypatch.setitem(torch_engine.PREFILL_TOKENS, "cpu", budget)
    scorer, asked, seen = load("gpt_neox"), prompts(), []
    scorer.model.register_forward_pre_hook(lambda m, a, k: seen.append(tuple(k["input_ids"].shape)), with_kwargs=True)
    engine(scorer).sample(asked, 8, Sampling(max_tokens=4), seed=0)
    first = [shape for shape in seen if shape[1] > 1]
    assert sum(rows for rows, _ in first) == 5 and [s for s in seen if s[1] == 1] == [(40, 1)] * 3
    assert len(first) == (1 if budget == 4096 else 3)
    assert all(rows * width <= budget or rows == 1 for rows, width in first)


@pytest.mark.parametrize("architecture", ["qwen3", "gpt_neox"])  # by our own step, and by the model's
def test_what_lay_in_memory_before_never_shows(load, architecture, monkeypatch):
    """New buffers are full of NaN; prompts go through the model a few at a time, each time padded to another width."""
    scorer, asked = load(architecture), prompts()
    monkeypatch.setitem(torch_engine.PREFILL_TOKENS, "cpu", 20)
    before = engine(scorer).sample(asked, 2, Sampling(max_tokens=9), 0)
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda self, *size, **options: self.new_full(size, 0).fill_(math.nan)
                        if self.is_floating_point() else self.new_zeros(size, **options))  # fmt: skip
    after = engine(scorer).sample(asked, 2, Sampling(max_tokens=9), 0)
    assert same(before, after) and np.array_equal(flat(before.entropies), flat(after.entropies))


def test_memory_bounds_the_rows_of_a_pass(load, monkeypatch):
    scorer, asked, held = load(), prompts((20,) * 6), []
    monkeypatch.setattr(
        torch_engine, "RowCache", lambda n, lengths, *rest: held.append(len(lengths)) or cache(n, lengths, *rest)
    )
    from echolab.engines.cache import RowCache as cache

    of_token = 2 * 2 * 2 * 16 * 4  # keys and values, layers, heads, size, float32
    engine(scorer, cache_bytes=17 * 30 * of_token).sample(asked, 8, Sampling(max_tokens=10), seed=0)
    assert held == [16, 16, 16]
    held.clear()
    engine(scorer, rows=20).sample(asked, 24, Sampling(max_tokens=10), seed=0)
    assert max(held) <= 20 and sum(held) == 144


def test_a_row_ends_where_the_models_context_does(load, monkeypatch):
    monkeypatch.setitem(torch_engine.LEAVE, "cpu", 2.0)
    scorer, long = load(), prompts((508, 5))
    made = TorchEngine(scorer.model).sample(long, 2, Sampling(max_tokens=6), seed=0)
    assert [len(c) for c in made.completion_ids] == [4, 4, 6, 6]
    assert set(made.finish_reason) == {"length"}
    ends = set(range(0, 451, 5))
    made = TorchEngine(scorer.model, sorted(ends)).sample(long, 8, Sampling(max_tokens=12), seed=0)
    for completion, reason in zip(made.completion_ids, made.finish_reason, strict=True):
        assert reason == ("stop" if completion[-1] in ends else "length")
    assert made.finish_reason[:8].count("length") > 2


def test_a_token_that_ends_at_the_last_place_is_a_stop(load):
    scorer, asked = load(), prompts()
    sampler = TorchEngine(scorer.model, range(451))
    made = sampler.sample(asked, 2, Sampling(max_tokens=1), seed=0)
    assert made.finish_reason == ["stop"] * 10 and {len(c) for c in made.completion_ids} == {1}


def test_weights_count_as_they_are_when_sampling_begins(load):
    scorer, asked, sampling = load(), prompts(), Sampling(max_tokens=20)
    sampler = engine(scorer)
    before = sampler.sample(asked, 2, sampling, seed=0)
    with torch.no_grad():
        for parameter in scorer.model.parameters():
            parameter.mul_(0.8)
    after = sampler.sample(asked, 2, sampling, seed=0)
    assert not same(before, after) and same(after, engine(scorer).sample(asked, 2, sampling, seed=0))


def test_a_model_in_training_samples_without_dropout_and_goes_on_training(load):
    scorer, asked, sampling = load("qwen2"), prompts(), Sampling(max_tokens=20)
    expected = engine(scorer).sample(asked, 2, sampling, seed=0)
    scorer.model.requires_grad_(True).train().activation_checkpointing_enable()
    for layer in scorer.model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    assert same(engine(scorer).sample(asked, 2, sampling, seed=0), expected)
    assert scorer.model.training
    out = scorer.model(torch.tensor(asked[:1])).logits.sum()
    out.backward()  # nothing that sampling left is in its way


def test_a_model_whose_attention_takes_packed_sequences_is_sampled_from_all_the_same(load):
    scorer, asked, sampling = load("gpt_neox"), prompts(), Sampling(max_tokens=20)
    expected = engine(scorer).sample(asked, 2, sampling, seed=0)
    packed.install(scorer.model)
    assert same(engine(scorer).sample(asked, 2, sampling, seed=0), expected)
    assert scorer.model.config._attn_implementation == packed.NAME


@pytest.mark.parametrize("architecture", ["qwen3", "gpt_neox"])
def test_bfloat16_is_sampled_as_it_is_scored(load, architecture):
    scorer = load(architecture, dtype="bfloat16")
    made = engine(scorer).sample(prompts(), 2, Sampling(max_tokens=20), seed=0)
    asked = [Sample(i, tuple(p), tuple(c)) for i, (p, c) in enumerate(zip(made.prompt_ids, made.completion_ids, strict=True))]
    scored = scorer.numbers(asked)
    differences = np.abs(flat(made.logprobs) - np.concatenate([scored[i][1].numpy() for i in range(len(asked))]))
    assert differences.mean() < 0.05 and made.logprobs[0].dtype == np.float32


# Drawing


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_a_token_is_drawn_as_often_as_it_is_likely(temperature):
    torch.manual_seed(0)
    logits = torch.randn(1, 300) * 3
    logits[0, :3] = -torch.inf
    uniform = torch.arange(1, 2**16 + 1).float() / 2**16
    token, logprob, entropy = draw(logits.expand(2**16, -1), uniform, Sampling(temperature=temperature))
    p = (logits[0].double() / temperature).softmax(-1)
    assert (token.bincount(minlength=300) / 2**16 - p).abs().max() < 2.1 / 2**16  # as even as the numbers are
    torch.testing.assert_close(logprob.double(), p.log()[token], rtol=0, atol=1e-5)
    expected = -(p * p.log()).nan_to_num().sum()
    torch.testing.assert_close(entropy.double(), expected.expand(2**16), rtol=0, atol=1e-5)


def test_completions_are_spread_as_the_model_says(load):
    scorer, [asked] = load("qwen2"), prompts((7,))
    with torch.inference_mode():
        p = scorer.model(torch.tensor([asked])).logits[0, -1].double().softmax(-1).numpy()
    made = engine(scorer).sample([asked], 20_000, Sampling(max_tokens=1), seed=0)
    counts = np.bincount(flat([np.array(c) for c in made.completion_ids]), minlength=len(p))
    likely = p * 20_000 > 5
    chi = ((counts - 20_000 * p)[likely] ** 2 / (20_000 * p)[likely]).sum()
    degrees = likely.sum() - 1
    assert abs(chi - degrees) < 5 * np.sqrt(2 * degrees)


@pytest.mark.parametrize(("top_k", "top_p"), [(5, 1.0), (0, 0.6), (0, 1e-6), (40, 0.9), (1, 1.0), (500, 0.999)])
def test_top_k_and_top_p_keep_what_transformers_keeps(top_k, top_p):
    torch.manual_seed(1)
    logits = torch.randn(8, 200) * 2
    expected = logits.clone()
    for warper, kept in ((TopKLogitsWarper, top_k), (TopPLogitsWarper, top_p if top_p < 1 else None)):
        expected = warper(kept)(None, expected) if kept else expected  # type: ignore[arg-type]
    uniform = torch.arange(1, 4097).float() / 4096
    for row, kept in zip(logits, expected, strict=True):
        token, logprob, _ = draw(row.expand(4096, -1), uniform, Sampling(top_k=top_k, top_p=top_p))
        p = kept.double().softmax(-1)
        assert (token.bincount(minlength=200) / 4096 - p).abs().max() < 2.1 / 4096
        assert set(token.tolist()) <= set(p.nonzero()[:, 0].tolist())
        torch.testing.assert_close(logprob, row.log_softmax(-1)[token], rtol=0, atol=1e-5)  # of the whole distribution


def test_many_rows_of_logits_are_drawn_in_parts(monkeypatch):
    logits, uniform = torch.randn(50, 100), torch.rand(50)
    whole = draw(logits, uniform, Sampling(top_p=0.9))
    monkeypatch.setattr("echolab.engines.draw.PART", 700)
    for a, b in zip(draw(logits, uniform, Sampling(top_p=0.9)), whole, strict=True):
        assert torch.equal(a, b)


def test_the_random_numbers_are_even_and_unrelated():
    keys = row_keys(0, [g for g in range(256) for _ in range(8)], list(range(8)) * 256)
    assert len(set(keys.tolist())) == 2048
    u = uniforms(keys, 64).double()
    assert u.min() > 0 and u.max() <= 1
    assert abs(u.mean() - 0.5) < 5 / (12 * u.numel()) ** 0.5
    cells = (u.flatten() * 64).long().clamp(max=63).bincount(minlength=64).double()
    assert abs((((cells - u.numel() / 64) ** 2) / (u.numel() / 64)).sum() - 63) < 5 * (2 * 63) ** 0.5
    z = (u - 0.5) * 12**0.5
    for a, b in ((z[1:], z[:-1]), (z[:, 1:], z[:, :-1]), (z[:, 8:], z[:, :-8])):  # next place, next sample, next prompt
        assert abs((a * b).mean()) < 5 / a.numel() ** 0.5
    assert torch.equal(uniforms(keys[5:], 7), u[:7, 5:].float())


# What cannot be sampled


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        ([[1], []], "prompt 1 is empty"),
        ([[1] * 512], "prompt 0 leaves no room in the model's context of 512 tokens"),
        ([[1, 451]], "prompt 0 has token ids that the model does not know"),
    ],
)
def test_prompts_that_cannot_be_gone_on_from_are_named(load, asked, reason):
    with pytest.raises(EcholabError, match=reason):
        engine(load()).sample(asked, 2, Sampling(), seed=0)


def test_a_model_that_gives_no_numbers_is_an_error(load):
    scorer = load()
    with torch.no_grad():
        scorer.model.model.norm.weight.fill_(torch.nan)
    with pytest.raises(EcholabError, match="output is not finite"):
        engine(scorer).sample(prompts(), 2, Sampling(max_tokens=3), seed=0)


def test_a_model_that_remembers_other_things_than_keys_is_refused():
    import transformers

    config = transformers.MambaConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1)
    with pytest.raises(EcholabError, match="MambaForCausalLM remembers more than keys and values"):
        TorchEngine(transformers.MambaForCausalLM(config))


def test_out_of_memory_says_how_many_rows_were_too_many(load, monkeypatch):
    def full(*_: Any) -> None:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp] . DefaultCPUAllocator: can't allocate memory: you tried 1 byte")

    monkeypatch.setattr(torch_engine, "draw", full)
    with pytest.raises(EcholabError, match="out of memory with 10 rollouts at once"):
        engine(load()).sample(prompts(), 2, Sampling(), seed=0)


@pytest.mark.parametrize("wrong", [{"temperature": -1}, {"temperature": float("nan")}, {"top_p": 0}, {"max_tokens": 0}])
def test_options_that_make_no_sense_are_refused(wrong):
    with pytest.raises(WrongUsage):
        Sampling.make(**wrong)


def test_nothing_asked_is_nothing_made(load):
    assert len(engine(load()).sample([], 4, Sampling(), seed=0)) == 0
