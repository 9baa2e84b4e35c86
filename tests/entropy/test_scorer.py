"""Scores against the model's own logits in float64, on every architecture, in whatever company a rollout is scored."""

from __future__ import annotations

import random

import pyarrow as pa
import pytest

torch = pytest.importorskip("torch", reason="scoring needs torch")
pytest.importorskip("transformers", reason="scoring needs transformers")

from generators import models  # noqa: E402

from echolab.entropy import packed, passes  # noqa: E402
from echolab.entropy.batching import Batch, Layout, Sample, batches  # noqa: E402
from echolab.entropy.render import COLUMNS  # noqa: E402
from echolab.entropy.scorer import Scorer, ScorerConfig  # noqa: E402
from echolab.errors import EcholabError, WrongUsage  # noqa: E402


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """`folder(architecture)`: a saved tiny model."""
    root, made = tmp_path_factory.mktemp("models"), {}

    def get(architecture: str = "qwen3"):
        if architecture not in made:
            made[architecture] = models.model(root / architecture, architecture)
        return made[architecture]

    return get


@pytest.fixture(scope="session")
def load(folder):
    def get(architecture: str = "qwen3", **options) -> Scorer:
        return Scorer.load(ScorerConfig.make(model=str(folder(architecture)), **options))

    return get


def samples(n: int = 9, seed: int = 0, prompts: int = 3) -> list[Sample]:
    rng = random.Random(seed)
    shared = [tuple(rng.randrange(400) for _ in range(rng.randrange(1, 30))) for _ in range(prompts)]
    return [Sample(i, shared[i % prompts], tuple(rng.randrange(451) for _ in range(rng.randrange(1, 60)))) for i in range(n)]


def reference(scorer: Scorer, sample: Sample, temperature: float = 1.0):
    """One by one, all logits, in float64."""
    model = scorer.model.double()
    with torch.inference_mode():
        logits = model(torch.tensor([sample.prompt + sample.completion]), use_cache=False).logits[0].double() / temperature
    model.float()
    logits = torch.log_softmax(logits[len(sample.prompt) - 1 : -1], -1)
    targets = torch.tensor(sample.completion)[:, None]
    return -(logits.exp() * logits).sum(-1), logits.gather(1, targets)[:, 0]


def close(numbers, expected, tolerance: float = 2e-5) -> bool:
    return all(float((a - b).abs().max()) <= tolerance for a, b in zip(numbers, expected, strict=True))


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("architecture", models.ARCHITECTURES)
def test_scores_are_those_of_the_models_own_logits_in_float64(load, architecture, share):
    scorer, asked = load(architecture, share_prompts=share, temperature=0.7), samples()
    numbers = scorer.numbers(asked)
    assert set(numbers) == {s.place for s in asked}
    for s in asked:
        assert close(numbers[s.place], reference(scorer, s, 0.7)), architecture


@pytest.mark.parametrize("architecture", ["qwen3", "gemma3", "gpt_neox"])
@pytest.mark.parametrize("budget", [1, 64, 300, 10_000])
def test_scores_do_not_depend_on_what_else_is_in_the_batch(load, architecture, budget):
    asked = samples(12, seed=1)
    alone = [load(architecture).numbers([s])[s.place] for s in asked]
    random.Random(budget).shuffle(asked)
    together = load(architecture, batch_tokens=budget).numbers(asked)
    assert all(close(together[s.place], alone[s.place], 1e-5) for s in asked)


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("budget", [1, 50, 200, 1000])
def test_batches_hold_every_sample_once_and_keep_their_budget(share, budget):
    asked = samples(40, seed=2)
    found = batches(asked, budget, share)
    assert sorted(s.place for b in found for s in b.samples) == list(range(40))
    for b in found:
        if b.layout is Layout.PADDED:
            assert b.computed == len(b.samples) * max(map(len, b.samples))
            assert b.computed <= budget or len(b.samples) == 1
            continue
        assert len({s.prompt for s in b.samples}) == 1
        assert [s for part in b.passes for s in part] == list(b.samples)
        sizes = [len(part) * max(len(s.completion) for s in part) for part in b.passes]
        assert all(size <= budget or len(part) == 1 for size, part in zip(sizes, b.passes, strict=True))
        assert b.computed == len(b.samples[0].prompt) + sum(sizes)
    assert share or not any(b.layout is Layout.SHARED for b in found)


def test_a_shared_prompt_is_computed_once_where_that_saves_tokens():
    prompt, long = tuple(range(200)), tuple(range(300))
    group = [Sample(i, prompt, long) for i in range(8)]
    [batch] = batches(group, 10_000)
    assert (batch.layout, batch.computed, len(batch.passes)) == (Layout.SHARED, 200 + 8 * 300, 1)
    [batch] = batches(group, 700)  # also where a pass takes but a few of its completions
    assert (batch.layout, batch.computed, len(batch.passes)) == (Layout.SHARED, 200 + 8 * 300, 4)
    [batch] = batches([Sample(i, prompt[:3], long) for i in range(8)], 10_000)
    assert batch.layout is Layout.PADDED


def row(**fields) -> dict:
    return {**dict.fromkeys(COLUMNS), "rollout_id": "a", "run": "r", "step": 1, "prompt_format": "raw", **fields}


def table(*rows: dict) -> pa.Table:
    lists = {"prompt_ids": pa.list_(pa.int32()), "completion_ids": pa.list_(pa.int32()), "loss_mask": pa.list_(pa.bool_())}
    types = {**dict.fromkeys(COLUMNS, pa.string()), "step": pa.int64(), **lists}
    return pa.Table.from_pylist(list(rows), schema=pa.schema(list(types.items())))


def scored(scorer: Scorer, **fields) -> dict:
    done = scorer(table(row(**fields)))
    assert done.skipped == []
    return done.tables["scores"].to_pylist()[0]


def reason(scorer: Scorer, **fields) -> str:
    [(rollout, why)] = scorer(table(row(**fields))).skipped
    assert rollout == "a"
    return why


def test_text_is_tokenised_and_its_numbers_are_those_of_these_tokens(load):
    scorer = load()
    text = "the sum of two\nand three is five 😀"
    made = scored(scorer, prompt="x = 12 so", completion=text)
    assert scorer.tokenizer.decode(made["token_ids"]) == text
    sample = Sample(0, tuple(scorer.tokenizer("x = 12 so")["input_ids"]), tuple(made["token_ids"]))
    entropies, logprobs = reference(scorer, sample)
    assert made["entropies"] == pytest.approx(entropies.tolist(), abs=2e-5)
    assert made["logprobs"] == pytest.approx(logprobs.tolist(), abs=2e-5)
    assert made["mean_entropy"] == pytest.approx(float(entropies.mean()), abs=1e-5)
    assert (made["n_tokens"], made["loss_mask"], made["scorer"]) == (len(sample.completion), None, scorer.id)


def test_a_final_end_token_is_scored_but_counts_in_no_mean(load):
    scorer = load()
    ids = scorer.tokenizer("two and three")["input_ids"]
    end = scorer.tokenizer.eos_token_id
    fields = {"prompt": "x", "tokenizer": scorer.vocab.tokenizer}
    made, without = scored(scorer, completion_ids=[*ids, end], **fields), scored(scorer, completion_ids=ids, **fields)
    assert len(made["entropies"]) == len(ids) + 1
    assert (made["n_tokens"], without["n_tokens"]) == (len(ids), len(ids))
    assert made["mean_entropy"] == pytest.approx(without["mean_entropy"], abs=1e-6)


def test_the_mean_counts_only_what_the_loss_mask_does(load):
    scorer = load()
    ids = scorer.tokenizer("two and three is five")["input_ids"]
    mask = [i % 2 == 0 for i in range(len(ids))]
    made = scored(scorer, prompt="x", completion_ids=ids, loss_mask=mask, tokenizer=scorer.vocab.tokenizer)
    counted = [e for e, m in zip(made["entropies"], mask, strict=True) if m]
    assert made["mean_entropy"] == pytest.approx(sum(counted) / len(counted), abs=1e-6)
    assert made["loss_mask"] == mask


def test_own_ids_are_used_where_they_are_this_tokenizers_and_the_text_where_they_are_not(load):
    scorer = load()
    text = "two and three"
    odd = [i for c in text for i in scorer.tokenizer(c)["input_ids"]]  # another way to write the same text
    assert odd != scorer.tokenizer(text)["input_ids"]
    assert scored(scorer, prompt="x", completion=text, completion_ids=odd)["token_ids"] == odd
    other = scored(scorer, prompt="x", completion=text, completion_ids=[5, 6, 7], tokenizer="another")
    assert other["token_ids"] == scorer.tokenizer(text)["input_ids"]
    assert (
        reason(scorer, prompt="x", completion_ids=[5, 6], tokenizer="another") == "it has only token ids, of tokenizer another"
    )


def test_a_chat_is_rendered_by_the_template_and_raw_on_request(load):
    fields = {
        "prompt_format": "chat",
        "messages": '[{"role": "user", "content": "x = 12"}]',
        "completion": "two",
    }
    chat = load()
    asked = tuple(chat.tokenizer("<|user|>x = 12<|end|><|assistant|>", add_special_tokens=False)["input_ids"])
    assert tuple(chat.renderer(row(**fields))[0]) == asked
    assert load(template="raw").renderer(row(**fields))[0] == chat.tokenizer("x = 12")["input_ids"]
    assert tuple(load(template="chat").renderer(row(prompt="x = 12", completion="two"))[0]) == asked
    assert len({load(template=t).id for t in ("auto", "raw", "chat")}) == 3


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"completion": ""}, "its completion is empty"),
        ({"completion_ids": [451], "tokenizer": "OWN"}, "it has token ids beyond the model's vocabulary"),
        ({"completion": "two " * 600}, "it is longer than the model's context"),
        (
            {"prompt_format": "chat", "messages": "[1]", "completion": "x"},
            "its messages are not those of a chat",
        ),
    ],
)
def test_what_cannot_be_scored_is_left_out_with_its_reason_and_the_others_are_scored(load, fields, why):
    scorer = load()
    fields = {k: scorer.vocab.tokenizer if v == "OWN" else v for k, v in fields.items()}
    done = scorer(table(row(prompt="x", **fields), row(rollout_id="b", prompt="x", completion="two")))
    assert done.skipped == [("a", why)]
    assert done.tables["scores"]["rollout_id"].to_pylist() == ["b"]


def test_too_long_rollouts_are_cut_on_request(load):
    scorer = load(too_long="truncate", max_tokens=16)
    made = scored(scorer, prompt="x = 12", completion="two and three is five so " * 20)
    assert len(made["token_ids"]) == 16 - len(scorer.tokenizer("x = 12")["input_ids"])
    assert scorer.id != load().id


def test_out_of_memory_halves_the_batch_and_a_single_rollout_that_is_too_large_is_an_error(load, monkeypatch):
    scorer, asked = load(share_prompts=False), samples(8)
    expected, sizes, forward = scorer.numbers(asked), [], passes.hidden_states

    def small(body, batch: Batch, device):
        sizes.append(len(batch.samples))
        if len(batch.samples) > limit:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")
        return forward(body, batch, device)

    monkeypatch.setattr(passes, "hidden_states", small)
    limit = 2
    numbers = scorer.numbers(asked)
    assert sizes == [8, 4, 2, 2, 4, 2, 2]
    assert all(close(numbers[s.place], expected[s.place], 1e-5) for s in asked)
    limit = 0
    with pytest.raises(EcholabError, match="out of memory for a single rollout"):
        scorer.numbers(asked)


def test_another_configuration_or_chat_template_is_another_scorer(load, tmp_path):
    longer = models.model(tmp_path / "longer")
    models.spoil(longer, rms_norm_eps=0.1)
    talk = models.model(tmp_path / "talk")
    (talk / "chat_template.jinja").write_text("{{ messages }}")
    assert len({load().id, *(Scorer.load(ScorerConfig(model=str(m))).id for m in (longer, talk))}) == 3


def test_a_device_that_is_not_there_is_one_line(folder):
    for device in ("tpu9", "cuda:7"):
        with pytest.raises(EcholabError, match=f"--device {device} cannot be used"):
            Scorer.load(ScorerConfig(model=str(folder()), device=device))


def test_the_scorers_id_follows_weights_temperature_and_precision_and_nothing_else(load, folder, tmp_path):
    same = load()
    assert load(batch_tokens=5, share_prompts=False, threads=1).id == same.id
    assert load(temperature=0.5).id != same.id
    assert load(dtype="bfloat16").id != same.id
    assert Scorer.load(ScorerConfig(model=str(models.model(tmp_path / "other", seed=1)))).id != same.id
    assert Scorer.load(ScorerConfig(model=str(models.model(tmp_path / "copy")))).id == same.id


def test_bad_models_are_one_clear_line(folder, tmp_path):
    def refused(path, match):
        with pytest.raises(EcholabError, match=match) as e:
            Scorer.load(ScorerConfig(model=str(path)))
        assert "\n" not in str(e.value)

    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "no tokenizer can be loaded|no config.json")
    broken = models.model(tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"x")
    refused(broken, "cannot be loaded")
    unknown = models.model(tmp_path / "unknown")
    models.spoil(unknown, model_type="nobody", architectures=["Nobody"])
    refused(unknown, "cannot be loaded")
    nan = models.model(tmp_path / "nan", scale=float("nan"))
    refused(nan, "holds NaN or infinite weights")


@pytest.mark.parametrize(
    "options", [{"temperature": 0}, {"temperature": float("nan")}, {"dtype": "int8"}, {"batch_tokens": 0}, {"mdoel": "x"}]
)
def test_wrong_options_are_refused_in_one_line(options):
    with pytest.raises(WrongUsage) as e:
        ScorerConfig.make(model="m", **options)
    assert "\n" not in str(e.value)


def loop_of_attention(q, k, v, cu_q, cu_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False):
    """What torch's kernel for CUDA is documented to do, one run after the other: causal from the lower right."""
    out = []
    for i in range(len(cu_q) - 1):
        a, b, c, d = (int(x) for x in (cu_q[i], cu_q[i + 1], cu_k[i], cu_k[i + 1]))
        at, to = torch.arange(d - c - (b - a), d - c)[:, None], torch.arange(d - c)[None]
        seen = (to <= at) & ((window_size[0] < 0) | (at - to <= window_size[0]))
        heads = (x.transpose(0, 1)[None] for x in (q[a:b], k[c:d], v[c:d]))
        made = torch.nn.functional.scaled_dot_product_attention(*heads, attn_mask=seen, scale=scale, enable_gqa=enable_gqa)
        out.append(made[0].transpose(0, 1))
    return torch.cat(out)


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3", "llama", "mistral", "gemma3", "gpt_neox"])
@pytest.mark.parametrize("budget", [1, 200, 10_000])
def test_packed_sequences_with_shared_prompts_score_as_single_ones_do(folder, load, architecture, budget, monkeypatch):
    asked = samples(14, seed=3, prompts=4)
    alone = [load(architecture).numbers([s])[s.place] for s in asked]
    monkeypatch.setattr(packed, "usable", lambda model, device: True)
    monkeypatch.setattr(packed, "_kernel", lambda: loop_of_attention)
    scorer = load(architecture, batch_tokens=budget)
    found = batches(asked, budget, pack=True)
    assert sorted(s.place for b in found for s in b.samples) == list(range(14))
    assert all(b.computed <= budget or len(b.samples) == 1 for b in found)
    together = scorer.numbers(asked)
    assert scorer.model.config._attn_implementation == packed.NAME
    assert all(close(together[s.place], alone[s.place], 1e-5) for s in asked)


def kernel_of_2_10(q, k, v, cu_q, cu_k, max_q, max_k, is_causal=False, return_aux=None):
    assert is_causal
    return loop_of_attention(q, k, v, cu_q, cu_k, max_q, max_k)


def kernel_without_groups(q, k, v, cu_q, cu_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)):
    assert window_size == (-1, 0)
    return loop_of_attention(q, k, v, cu_q, cu_k, max_q, max_k, scale=scale)


@pytest.mark.parametrize("kernel", [kernel_of_2_10, kernel_without_groups])
def test_the_kernels_of_older_torch_versions_attend_in_the_same_way(kernel, monkeypatch):
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, 12, 8, generator=g) for heads in (4, 2, 2))
    cuts = torch.tensor([0, 5, 12], dtype=torch.int32)
    lengths = {"cu_seq_lens_q": cuts, "cu_seq_lens_k": cuts, "max_length_q": 7, "max_length_k": 7}
    found = []
    for which in (loop_of_attention, kernel):
        monkeypatch.setattr(packed, "_kernel", lambda which=which: which)
        found.append(packed.attend(None, q, k, v, None, scaling=0.3, **lengths)[0])
    torch.testing.assert_close(found[1], found[0])


def test_a_pack_holds_each_prompt_of_several_completions_once():
    pack = packed.layout([(1, 2), (3,)], [[(4, 5), (6,)], [(7, 8)]])
    assert pack.ids == [1, 2, 4, 5, 6, 3, 7, 8]
    assert pack.positions == [0, 1, 2, 3, 2, 0, 1, 2]
    assert (pack.queries, pack.keys) == ([2, 2, 1, 3], [2, 4, 3, 3])
    assert pack.predicts == [1, 2, 1, 5, 6]
