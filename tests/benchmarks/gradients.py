"""Oracle E: a tabular policy of 4 codes and 3 steps, all of whose 64 clips can be enumerated, in float64.

Every expectation is a sum over all clips, or over all pairs of clips of a prompt, each with its probability; nothing is
sampled. The truth is the central finite difference of the enumerated objective J = (1 - a) E[R] - a KL. What is judged
are the library's own functions.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from musicrl_jax.losses import policy_gradient
from musicrl_jax.systems.system import Sampling

CODES, STEPS, STRENGTH = 4, 3, 0.3
CLIPS = np.array(list(itertools.product(range(CODES), repeat=STEPS)))  # [64, 3]
PAIRS = np.array(list(itertools.product(range(len(CLIPS)), repeat=2)))  # [4096, 2]
CONTEXTS = 1 + CODES + CODES**2
STEP = 0.05  # of gradient ascent, before the second update of a rollout


def contexts(tokens):
    """A number for the prefix before each token, [..., S]: 0 for the empty one, then 1 .. 4, then 5 .. 20."""
    first, second = tokens[..., 0], tokens[..., 1]
    return jnp.stack(
        [jnp.zeros_like(first), 1 + first, 1 + CODES + CODES * first + second], axis=-1
    )


def log_distribution(theta, tokens, allowed=None):
    """f64 [..., S, V]; of the codes that are allowed after each prefix, bool [21, V]."""
    return Sampling(1.0).log_distribution(theta, allowed)[contexts(tokens)]


def probabilities(theta, allowed=None):
    """Of all clips, [64]."""
    scores = jnp.take_along_axis(
        log_distribution(theta, CLIPS, allowed), CLIPS[:, :, None], axis=-1
    )
    return jnp.exp(scores.sum(axis=(1, 2)))


def problem(seed=0):
    """Logits of policy and anchor, a reward for each clip, a value for each prefix, all random; all codes allowed."""
    rng = np.random.default_rng(seed)
    return {
        "theta": rng.normal(size=(CONTEXTS, CODES)),
        "anchor": rng.normal(size=(CONTEXTS, CODES)),
        "rewards": rng.normal(size=len(CLIPS)),
        "values": rng.normal(size=CONTEXTS),
        "allowed": None,
    }


def expected_reward(theta, problem):
    return (probabilities(theta, problem["allowed"]) * problem["rewards"]).sum()


def kl(theta, problem):
    p, q = (probabilities(logits, problem["allowed"]) for logits in (theta, problem["anchor"]))
    return jnp.where(p > 0, p * jnp.log(p / q), 0.0).sum()


def objective(theta, problem, strength=STRENGTH):
    return (1 - strength) * expected_reward(theta, problem) - strength * kl(theta, problem)


def finite_difference(function, theta):
    """The gradient of function(theta) by central differences."""
    gradient, step = np.zeros_like(theta), 1e-6
    for index in np.ndindex(*theta.shape):
        nudge = np.zeros_like(theta)
        nudge[index] = step
        gradient[index] = (function(theta + nudge) - function(theta - nudge)) / (2 * step)
    return gradient


def mean_gradient(
    choice,
    problem,
    theta=None,
    loss=policy_gradient.policy_loss,
    values=None,
    batch=None,
    scored_on="allowed",
):
    """Minus the expected gradient of the library's loss at `theta`, over all batches that the problem's policy draws.

    A batch is `batch` clips, by default the group: 1 or 2. Another `theta` than the problem's is a later update's;
    with another `scored_on` than "allowed" policy and anchor are scored on all codes, whatever they were drawn from.
    """
    drawn, allowed = jnp.asarray(problem["theta"]), problem["allowed"]
    theta = drawn if theta is None else jnp.asarray(theta)
    weight = probabilities(drawn, allowed)
    rows = (
        PAIRS if (batch or choice.clips_per_prompt) == 2 else np.arange(len(CLIPS))[:, None]
    )  # [N, B]
    rows = rows if allowed is None else rows[np.asarray(weight[rows].prod(axis=1) > 0)]
    scoring = functools.partial(
        log_distribution, allowed=allowed if scored_on == "allowed" else None
    )
    tokens, rewards = jnp.asarray(CLIPS[rows]), jnp.asarray(problem["rewards"])[rows]
    values = (
        jnp.asarray(problem["values"])[contexts(CLIPS)] if values is None else jnp.asarray(values)
    )
    anchor = jnp.asarray(problem["anchor"])

    def one(theta, tokens, rewards, values):
        log_anchor = scoring(anchor, tokens)
        drawn_at = scoring(drawn, tokens)
        judged = values if choice.baseline == "value" else None
        drawn_scores = policy_gradient.scores(drawn_at, log_anchor, tokens)
        found, _ = policy_gradient.advantage(choice, drawn_scores, rewards, judged, STRENGTH)
        current = policy_gradient.scores(scoring(theta, tokens), log_anchor, tokens)
        return -loss(choice, current, found, STRENGTH)[0]

    gradients = jax.jit(jax.vmap(jax.grad(one), in_axes=(None, 0, 0, 0)))(
        theta, tokens, rewards, values[rows]
    )
    return jnp.einsum("n,nij->ij", weight[rows].prod(axis=1), gradients)


def error(found, truth):
    """Relative error, in the Euclidean norm."""
    return float(np.linalg.norm(found - truth) / np.linalg.norm(truth))


def cosine(found, truth):
    return float((found * truth).sum() / np.linalg.norm(found) / np.linalg.norm(truth))


def table(problem, truth):
    """Markdown: relative error and cosine of the first update after a rollout; clipped, of the second one too."""
    moved = problem["theta"] + STEP * truth
    after = finite_difference(lambda theta: objective(theta, problem), moved)
    names = [f'kl="{kl_}"' for kl_ in policy_gradient.KLS]
    lines = [f"| baseline | surrogate | {' | '.join(names)} |", "|---" * (2 + len(names)) + "|"]
    for baseline, surrogate in itertools.product(
        policy_gradient.BASELINES, policy_gradient.SURROGATES
    ):
        cells = []
        for kl_ in policy_gradient.KLS:
            choice = policy_gradient.PolicyGradient(baseline, surrogate, kl_, group=2)
            cell = _cell(mean_gradient(choice, problem), truth)
            if surrogate == "clipped":
                cell += f"; then {_cell(mean_gradient(choice, problem, theta=moved), after)}"
            cells.append(cell)
        lines.append(f"| {' | '.join([f'`{baseline}`', f'`{surrogate}`', *cells])} |")
    return "\n".join(lines)


def _cell(found, truth):
    off = error(found, truth)
    return "< 1e-7" if off < 1e-7 else f"{off:.2g} (cos {cosine(found, truth):.3f})"


def main():
    with jax.enable_x64(True):
        found = problem()
        print(
            table(found, finite_difference(lambda theta: objective(theta, found), found["theta"]))
        )


if __name__ == "__main__":
    main()
