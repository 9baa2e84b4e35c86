"""Equal to TRL: the loss and every gradient of one tiny model on one batch, against TRL's own GRPOTrainer and RLOOTrainer.

TRL gets its padded batch, prompts on the left and completions on the right. We get the same sequences packed without padding,
and log-probs from our own head. The model is in float64, so that what is compared is not its rounding (TRL's head computes in
float32 all the same). TRL's loss is private API, so its version is pinned."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest

pytestmark = pytest.mark.slow

torch = pytest.importorskip("torch")
trl: Any = pytest.importorskip("trl")
if not trl.__version__.startswith("1.16."):
    pytest.skip(f"compared with the private loss of TRL 1.16, not {trl.__version__}", allow_module_level=True)

from datasets import Dataset  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402
from torch.nn.utils.rnn import pad_sequence  # noqa: E402
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM  # noqa: E402

from echolab.entropy import batching  # noqa: E402
from echolab.entropy.head import Head, token_logprobs  # noqa: E402
from trainer.advantages import advantages, soft_overlong  # noqa: E402
from trainer.algorithms import Algorithm, choose  # noqa: E402
from trainer.objective import Batch, denominators, objective  # noqa: E402

get_soft_overlong_punishment = pytest.importorskip("trl.rewards.other_rewards").get_soft_overlong_punishment

VOCABULARY, ROWS, WIDTH, LONGEST, TEMPERATURE = 64, 4, 9, 12, 0.7
PROMPTS = [[5, 6, 7], [5, 6, 7], [8, 9], [8, 9]]
LENGTHS = [9, 4, 1, 6]


@pytest.fixture(scope="module")
def tokenizer():
    words = {f"w{i}": i for i in range(VOCABULARY - 3)} | {"<pad>": 61, "<eos>": 62, "<unk>": 63}
    raw = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        pad_token_id=61,
        eos_token_id=62,
        bos_token_id=None,
    )
    return Qwen2ForCausalLM(config).double().eval()


@pytest.fixture
def theirs(model, tokenizer, tmp_path) -> Callable[..., Any]:
    """`theirs(**config)` is TRL's trainer around a copy of the model."""

    def make(kind: str = "grpo", batch: int = ROWS, rewards: Any = None, **options: Any) -> Any:
        names = ("GRPOConfig", "GRPOTrainer") if kind == "grpo" else ("RLOOConfig", "RLOOTrainer")
        config, trainer = (getattr(trl, name) for name in names)
        arguments: dict[str, Any] = {
            "output_dir": str(tmp_path), "per_device_train_batch_size": batch, "gradient_accumulation_steps": 1,
            "num_generations": 2, "max_completion_length": LONGEST, "temperature": TEMPERATURE, "use_cpu": True, "bf16": False,
            "report_to": [], "save_strategy": "no", "gradient_checkpointing": False, "beta": 0.0, **options,
        }  # fmt: skip
        made = trainer(
            model=copy.deepcopy(model),
            reward_funcs=rewards or (lambda completions, **_: [0.0] * len(completions)),
            args=config(**arguments),
            train_dataset=Dataset.from_dict({"prompt": ["w5 w6 w7", "w8 w9"]}),
            processing_class=tokenizer,
        )
        made.current_gradient_accumulation_steps = arguments["gradient_accumulation_steps"]
        made.model.train()
        return made

    return make


class Case:
    """One batch, with log-probs of an older, a reference and a sampling policy near the current one."""

    def __init__(self, model: Any, empty: tuple[int, ...] = (), seed: int = 0, gap: float = 0.5):
        g = torch.Generator().manual_seed(seed)
        self.completions = [torch.randint(0, 60, (n,), generator=g).tolist() for n in LENGTHS]
        self.mask = torch.arange(WIDTH) < torch.tensor(LENGTHS)[:, None]
        self.loss_mask = self.mask.clone()
        self.loss_mask[list(empty)] = False
        self.advantages = torch.tensor([1.3, -0.7, -1.1, 0.6], dtype=torch.float64)
        with torch.no_grad():
            current = self.logp(model)[0]
        noise = [torch.randn(ROWS, WIDTH, generator=g, dtype=torch.float64) * gap for _ in range(3)]
        self.old, self.reference, self.sampler = (torch.where(self.mask, current + x, 0.0) for x in noise)

    def logp(self, model: Any, rows: tuple[int, ...] = tuple(range(ROWS))) -> tuple[Any, Any]:
        """Ours, [rows, T] each: log-probs and entropies."""
        samples = [batching.Sample(i, tuple(PROMPTS[i]), tuple(self.completions[i])) for i in rows]
        batch = batching.Batch(tuple(samples), batching.Layout.PACKED)
        hidden, targets = batching.hidden_states(model.base_model, batch, torch.device("cpu"))
        both = token_logprobs(hidden, Head.of(model), targets, TEMPERATURE, entropy_grad=True)
        padded = []
        for flat in both:
            found = pad_sequence(list(flat.split([len(s.completion) for s in samples])), batch_first=True)
            padded.append(torch.nn.functional.pad(found, (0, WIDTH - found.shape[1])))
        return padded[0], padded[1]

    def inputs(self, rows: slice = slice(None), **more: Any) -> dict[str, Any]:
        """Theirs."""
        prompts = [[61] * (3 - len(p)) + p for p in PROMPTS]
        completions = [c + [61] * (WIDTH - len(c)) for c in self.completions]
        every = {
            "prompt_ids": torch.tensor(prompts),
            "prompt_mask": torch.tensor([[int(t != 61) for t in p] for p in prompts]),
            "completion_ids": torch.tensor(completions),
            "completion_mask": self.loss_mask.long(),
            "advantages": self.advantages,
            "old_per_token_logps": self.old,
            "ref_per_token_logps": self.reference,
            **more,
        }
        return {k: v[rows] for k, v in every.items()} | {"num_items_in_batch": self.loss_mask.sum()}

    def batch(self, **more: Any) -> Batch:
        given: dict[str, Any] = {"old": self.old, "reference": self.reference, **more}
        return Batch(self.loss_mask, self.advantages, **given)


def ours(model: Any, case: Case, algorithm: Algorithm, batch: Batch, divisors: dict[str, float] | None = None):
    """(loss, gradients), with every row in a micro-batch of its own."""
    model = copy.deepcopy(model)
    divisors = divisors or denominators([batch], algorithm, longest=LONGEST)
    total = 0.0
    for i in range(ROWS):
        logp, entropy = case.logp(model, (i,))
        loss = objective(logp, batch.take(torch.tensor([i])), algorithm, divisors, entropy=entropy).total
        loss.backward()
        total += loss.item()
    return total, {n: p.grad for n, p in model.named_parameters()}


def gradients(trainer: Any, *batches: dict[str, Any]):
    total = 0.0
    for inputs in batches:
        loss = trainer._compute_loss(trainer.model, inputs)
        loss.backward()
        total += loss.item()
    return total, {n: p.grad for n, p in trainer.model.named_parameters()}


def assert_equal(found: tuple[float, dict], expected: tuple[float, dict]) -> None:
    """Relative error at most 1e-5: of the loss, and of the gradient of each parameter in the norm."""
    assert found[0] == pytest.approx(expected[0], rel=1e-5, abs=0)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        assert gradient.norm() > 0
        assert (found[1][name] - gradient).norm() <= 1e-5 * gradient.norm(), name


KL = {"beta": 0.04, "kl": "k3"}
CASES: dict[str, tuple[Algorithm, dict[str, Any]]] = {
    "grpo": (choose("grpo"), {"loss_type": "grpo"}),
    "grpo with KL": (choose("grpo", **KL), {"loss_type": "grpo", "beta": 0.04}),
    "grpo with KL times ratio": (
        choose("grpo", beta=0.04, kl="rho_k3"),
        {"loss_type": "grpo", "beta": 0.04, "use_bias_correction_kl": True},
    ),
    "grpo with entropy": (choose("grpo", entropy=0.05), {"loss_type": "grpo", "entropy_coef": 0.05}),
    "dr_grpo": (choose("dr_grpo"), {"loss_type": "dr_grpo", "scale_rewards": "none"}),
    "dr_grpo with KL": (choose("dr_grpo", **KL), {"loss_type": "dr_grpo", "scale_rewards": "none", "beta": 0.04}),
    "dapo": (choose("dapo"), {"loss_type": "dapo", "epsilon_high": 0.28}),
    "dapo with KL": (choose("dapo", **KL), {"loss_type": "dapo", "epsilon_high": 0.28, "beta": 0.04}),
    "dapo with dual clip": (choose("dapo", dual=1.4), {"loss_type": "dapo", "epsilon_high": 0.28, "delta": 1.4}),
    "narrow clip": (choose("grpo", low=0.02, high=0.05), {"loss_type": "grpo", "epsilon": 0.02, "epsilon_high": 0.05}),
    "gspo": (
        choose("gspo"),
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 3e-4, "epsilon_high": 4e-4},
    ),
    "gspo with KL": (
        choose("gspo", low=0.1, high=0.1, **KL),
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 0.1, "beta": 0.04},
    ),
    "gspo_token": (
        choose("gspo_token", low=0.1, high=0.1),
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 0.1},
    ),
    "cispo": (choose("cispo", cap=1.2), {"loss_type": "cispo", "epsilon_high": 1.2}),
    "bnpo": (choose("grpo", aggregation="token_mean"), {"loss_type": "bnpo"}),
    "luspo": (
        choose("gspo", aggregation="seq_sum", low=0.1, high=0.1),
        {"loss_type": "luspo", "importance_sampling_level": "sequence", "epsilon": 0.1},
    ),
}


def trl_loss(theirs: Any, case: Case, options: dict[str, Any], **inputs: Any):
    trainer = theirs(**{"epsilon": 0.2, "use_bias_correction_kl": False, **options, "beta": 0.0})
    trainer.beta = options.get("beta", 0.0)  # afterwards: in the configuration it would load a reference model by name
    return gradients(trainer, case.inputs(**inputs))


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradients_are_those_of_trl(name, model, theirs):
    algorithm, options = CASES[name]
    case = Case(model)
    assert_equal(ours(model, case, algorithm, case.batch()), trl_loss(theirs, case, options))


@pytest.mark.parametrize("name", ["grpo", "dapo with KL", "dr_grpo", "cispo"])
def test_on_policy_without_log_probs_before_the_update(name, model, theirs):
    algorithm, options = CASES[name]
    case = Case(model)
    trainer = theirs(**{"use_bias_correction_kl": False, **options, "beta": 0.0})
    trainer.beta = options.get("beta", 0.0)
    inputs = case.inputs()
    del inputs["old_per_token_logps"]
    assert_equal(ours(model, case, algorithm, case.batch(old=None)), gradients(trainer, inputs))


@pytest.mark.parametrize("name", ["grpo", "grpo with KL", "dr_grpo", "dapo with KL", "gspo", "cispo", "bnpo"])
def test_masked_truncated_completions(name, model, theirs):
    """TRL still counts a masked row where it averages rows; given its count, all is equal."""
    algorithm, options = CASES[name]
    case = Case(model, empty=(0,))
    batch = case.batch()
    divisors = denominators([batch], algorithm, longest=LONGEST)
    if algorithm.aggregation != "token_mean":
        assert divisors["policy"] == (3 if algorithm.aggregation == "seq_mean" else 3 * LONGEST)
        divisors["policy"] *= ROWS / 3
    assert_equal(ours(model, case, algorithm, batch, divisors), trl_loss(theirs, case, options))


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "dapo", "cispo"])
def test_two_micro_batches_of_trl_are_our_four(name, model, theirs):
    algorithm, options = CASES[name]
    case = Case(model)
    trainer = theirs(batch=2, gradient_accumulation_steps=2, epsilon=0.2, **options)
    halves = [case.inputs(rows) for rows in (slice(0, 2), slice(2, 4))]
    assert_equal(ours(model, case, algorithm, case.batch()), gradients(trainer, *halves))


@pytest.mark.parametrize("cap", [1.1, 3.0])
def test_truncated_importance_sampling(cap, model, theirs):
    case = Case(model)
    case.sampler[0, 2] = math.nan
    trainer = theirs(loss_type="dapo", epsilon_high=0.28, use_bias_correction_kl=False)
    trainer.beta, trainer.use_vllm, trainer.vllm_importance_sampling_correction = 0.04, True, True
    weights = (case.old - case.sampler).nan_to_num(nan=0.0).exp().clamp(max=cap)  # as its token_truncate makes them
    expected = gradients(trainer, case.inputs(importance_sampling_ratio=weights))
    algorithm = choose("dapo", sampler_cap=cap, **KL)
    assert_equal(ours(model, case, algorithm, case.batch(sampler=case.sampler)), expected)


@pytest.mark.parametrize("width", [0.2, 2.0])
def test_rloo_over_sequences(width, model, theirs):
    case = Case(model)
    trainer = theirs("rloo", epsilon=width)
    expected = gradients(trainer, case.inputs() | {"old_logps": case.old.sum(1)})
    algorithm = choose("rloo_seq", low=width, high=width)
    assert_equal(ours(model, case, algorithm, case.batch()), expected)


def test_advantages_for_each_token(model, theirs):
    """reinforce_pp and others hand over one advantage a token."""
    case = Case(model)
    case.advantages = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    assert_equal(
        ours(model, case, choose("reinforce_pp"), case.batch()), trl_loss(theirs, case, {"loss_type": "dapo", "epsilon": 0.2})
    )


@pytest.mark.parametrize(
    ("kind", "trainer", "options"),
    [
        ("grpo", "grpo", {"scale_rewards": "group"}),
        ("centred", "grpo", {"scale_rewards": "none"}),
        ("batch_std", "grpo", {"scale_rewards": "batch"}),
        ("rloo", "rloo", {}),
    ],
)
def test_advantages_are_those_that_trl_makes_of_the_same_rewards(kind, trainer, options, theirs):
    """Through its own sampling and grading; the third answer of the second prompt has no grade."""
    rewards = [1.0, 0.25, 0.0, 0.0, 1.0, 0.5, None, 1.0]
    found = theirs(trainer, batch=8, num_generations=4, rewards=lambda completions, **_: list(rewards), **options)
    prompts = [{"prompt": p} for p in ("w5 w6 w7", "w8 w9") for _ in range(4)]
    expected = found._generate_and_score_completions(prompts)["advantages"]
    given = torch.tensor([math.nan if r is None else r for r in rewards])
    values = advantages(given, torch.tensor([0] * 4 + [1] * 4), kind).values
    torch.testing.assert_close(values, expected, rtol=1e-5, atol=1e-6)


def test_soft_overlong_is_trls():
    lengths = [1, 79, 80, 81, 90, 99, 100]
    expected = get_soft_overlong_punishment(100, 20)([[0] * n for n in lengths])
    assert soft_overlong(torch.tensor(lengths), 100, 0.2).tolist() == pytest.approx(expected)
