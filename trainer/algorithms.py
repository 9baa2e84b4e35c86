"""The algorithms as rows of one table: seven independent choices, no class for each.

advantages.py and objective.py read these choices; nothing else decides what an algorithm is. To try another combination, take
a row and change a field: `choose("grpo", high=0.28)`."""

from __future__ import annotations

import difflib
from typing import Any, Literal, Self

from pydantic import ConfigDict, NonNegativeFloat, PositiveFloat, model_validator

from echolab.config import Config
from echolab.errors import WrongUsage

Advantage = Literal["grpo", "centred", "batch_std", "rloo", "reinforce_pp", "reinforce_pp_baseline", "raft"]
Ratio = Literal["none", "token", "sequence", "sequence_token", "sequence_sum"]
Clip = Literal["none", "ppo", "cispo"]
Aggregation = Literal["token_mean", "seq_mean", "seq_sum", "seq_sum_const"]
KL = Literal["k1", "k2", "k3", "rho_k3", "reward"]


class Algorithm(Config):
    """One row. The names follow `LOSS = AGG[w * pg + beta * kl] - entropy * MEAN[H] + clip terms`."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    advantage: Advantage = "grpo"
    """How the rewards of a group become advantages: see advantages.py."""

    eps: NonNegativeFloat = 1e-4
    """Added to the standard deviation that `grpo` and `batch_std` divide by: 1e-4 in TRL, 1e-6 in verl."""

    ratio: Ratio = "token"
    """What is compared with the policy before the update. `token`: each token. `sequence`: the geometric mean over the
    completion (GSPO). `sequence_token`: the same value, with each token's own gradient. `sequence_sum`: the product over the
    completion. `none`: nothing, plain REINFORCE."""

    clip: Clip = "ppo"
    """`ppo`: the ratio is held within 1 - low and 1 + high where that lowers the gain. `cispo`: the ratio is a constant weight,
    at most `cap`, and every token keeps its gradient. `none`: neither."""

    low: NonNegativeFloat = 0.2
    """How far `ppo` lets the ratio fall."""

    high: NonNegativeFloat = 0.2
    """How far `ppo` lets the ratio rise."""

    dual: PositiveFloat | None = None
    """Dual clip, with `ppo`: the largest ratio at which a negative advantage counts in full. Above 1 + high; 3 in verl."""

    cap: PositiveFloat | None = None
    """With `cispo`, the largest weight: the ratio itself, not its distance from 1."""

    aggregation: Aggregation = "token_mean"
    """`token_mean`: over all tokens of the step. `seq_mean`: over completions, of their token means. `seq_sum`: over
    completions, of their token sums. `seq_sum_const`: the same, divided by the longest completion that may be sampled."""

    beta: NonNegativeFloat = 0.0
    """The weight of the KL to the reference policy. It is 0 in every row, as a KL costs a copy of the model and a pass;
    published: GRPO 0.001 (DeepSeek-R1), RLOO 0.05, REINFORCE++ 0.01, RAFT++ 0.001."""

    kl: KL = "k3"
    """With x = ln(reference / policy), an estimator in the loss: `k1` = -x (no gradient on average), `k2` = x^2/2 (exact on
    policy), `k3` = exp(x) - x - 1 (DeepSeekMath), `rho_k3` = ratio * k3 (exact; TRL's default). `reward`: k1 is taken from the
    reward instead."""

    kl_rows: Literal["all", "advantage"] = "all"
    """Whether the KL in the loss also pulls at rows without an advantage, as those of degenerate groups are."""

    entropy: NonNegativeFloat = 0.0
    """The weight of the entropy bonus, a mean over all tokens. 0.001 in the scripts of LUFFY, UFT and EchoRL."""

    sampler_cap: PositiveFloat | None = None
    """Where the sampler's log-probs are known: tokens are weighed with min(trainer / sampler, cap), and the cap is often 2
    (truncated importance sampling). Without it the mismatch is only logged."""

    dynamic_sampling: bool = False
    """Drop groups whose success is constant and sample until the step is full (DAPO)."""

    soft_overlong: NonNegativeFloat = 0.0
    """The last share of the longest completion, over which the reward falls by 1 (DAPO: 4096 of 20480 tokens); 0 is off."""

    mask_truncated: bool = False
    """Completions that were cut off have no part in the policy's loss. DAPO's best run has `soft_overlong` instead."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if (self.cap is None) == (self.clip == "cispo"):
            raise ValueError("clip = cispo needs a cap" if self.cap is None else "cap belongs to clip = cispo")
        if self.dual is not None and (self.clip != "ppo" or self.dual <= 1 + self.high):
            raise ValueError(f"dual belongs to clip = ppo and lies above 1 + high = {1 + self.high:g}")
        if self.soft_overlong > 1:
            raise ValueError("soft_overlong is a share of the longest completion, at most 1")
        if self.ratio == "none" and self.clip != "none":
            raise ValueError("without a ratio there is nothing to clip: set clip = none")
        return self


ALGORITHMS = {
    "grpo": Algorithm(advantage="grpo", aggregation="seq_mean"),
    "dr_grpo": Algorithm(advantage="centred", aggregation="seq_sum_const"),
    "dapo": Algorithm(advantage="grpo", high=0.28, dynamic_sampling=True, soft_overlong=0.2),
    "gspo": Algorithm(advantage="grpo", ratio="sequence", low=3e-4, high=4e-4, aggregation="seq_mean"),
    "gspo_token": Algorithm(advantage="grpo", ratio="sequence_token", low=3e-4, high=4e-4, aggregation="seq_mean"),
    "cispo": Algorithm(advantage="grpo", clip="cispo", cap=5.0),
    "rloo_tok": Algorithm(advantage="rloo", kl="reward"),
    "rloo_seq": Algorithm(advantage="rloo", ratio="sequence_sum", aggregation="seq_mean", kl="reward"),
    "reinforce_pp": Algorithm(advantage="reinforce_pp", kl="reward"),
    "reinforce_pp_baseline": Algorithm(advantage="reinforce_pp_baseline", kl="k2"),
    "raft": Algorithm(advantage="raft", ratio="none", clip="none"),
    "raft_pp": Algorithm(advantage="raft"),
}


def choose(name: str, **changes: Any) -> Algorithm:
    """The row of this name, with fields changed."""
    if name not in ALGORITHMS:
        near = difflib.get_close_matches(name, ALGORITHMS, 2)
        hint = f"did you mean {' or '.join(near)}?" if near else f"use one of {', '.join(ALGORITHMS)}"
        raise WrongUsage(f"there is no algorithm {name!r}; {hint}")
    return Algorithm.make(**{**ALGORITHMS[name].model_dump(), **changes})
