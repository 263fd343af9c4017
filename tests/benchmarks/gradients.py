"""Oracle: a tabular policy of 4 codes and 3 steps, whose 64 clips are enumerated in float64.

Every expectation is a sum over all clips, or all pairs of clips of a prompt, weighted by their
probability; nothing is sampled. The truth is the central finite difference of the enumerated
objective J = (1 - a) E[R] - a KL. It is compared with the library's own functions.

Run as a script, it prints the table of `musicrl_jax/rl/README.md`.
"""

import argparse
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
    """Numbers the prefix before each token: [..., S] -> [..., S].

    The empty prefix is 0, prefixes of one token are 1 .. 4, those of two 5 .. 20.
    """
    first, second = tokens[..., 0], tokens[..., 1]
    longest = 1 + CODES + CODES * first + second
    return jnp.stack([jnp.zeros_like(first), 1 + first, longest], axis=-1)


def log_distribution(theta, tokens, allowed=None):
    """Returns f64 [..., S, V], over the allowed codes after each prefix, bool [21, V]."""
    return Sampling(1.0).log_distribution(theta, allowed)[contexts(tokens)]


def probabilities(theta, allowed=None):
    """Returns the probability of every clip, [64]."""
    log_probs = log_distribution(theta, CLIPS, allowed)
    scores = jnp.take_along_axis(log_probs, CLIPS[:, :, None], axis=-1)
    return jnp.exp(scores.sum(axis=(1, 2)))


def problem(seed=0):
    """Draws logits of policy and anchor, a reward per clip and a value per prefix."""
    rng = np.random.default_rng(seed)
    return {
        "theta": rng.normal(size=(CONTEXTS, CODES)),
        "anchor": rng.normal(size=(CONTEXTS, CODES)),
        "rewards": rng.normal(size=len(CLIPS)),
        "values": rng.normal(size=CONTEXTS),
        "allowed": None,
    }


# --- the truth ---


def expected_reward(theta, problem):
    """Returns E[R]."""
    return (probabilities(theta, problem["allowed"]) * problem["rewards"]).sum()


def kl(theta, problem):
    """Returns KL(pi || anchor) of whole clips."""
    p, q = (probabilities(logits, problem["allowed"]) for logits in (theta, problem["anchor"]))
    return jnp.where(p > 0, p * jnp.log(p / q), 0.0).sum()


def objective(theta, problem, strength=STRENGTH):
    """Returns J."""
    return (1 - strength) * expected_reward(theta, problem) - strength * kl(theta, problem)


def finite_difference(function, theta):
    """Returns the gradient of function(theta) by central differences."""
    step, size = 1e-6, theta.size
    nudges = step * np.eye(size).reshape(size, *theta.shape)
    values = jax.jit(jax.vmap(function))(np.concatenate([theta + nudges, theta - nudges]))
    return (np.asarray(values[:size] - values[size:]) / (2 * step)).reshape(theta.shape)


# --- the library's gradient ---


def mean_gradient(choice, problem, **options):
    """Returns the gradient of one choice, as `mean_gradients`."""
    return mean_gradients((choice,), problem, **options)[0]


def mean_gradients(
    choices,
    problem,
    theta=None,
    loss=policy_gradient.policy_loss,
    values=None,
    batch=None,
    scored_on="allowed",
):
    """Returns minus the expected gradient of the library's loss over all batches, for each choice.

    Args:
      choices: PolicyGradients with the same number of clips per prompt. They are compiled as one
        program, which takes an eighth of the time of one program each.
      problem: its policy samples the batches.
      theta: logits of the policy being updated; by default those of `problem` (a first update).
      loss: in place of the library's.
      values: f64 [64, S], in place of the problem's.
      batch: clips of a batch, 1 or 2; by default those of a prompt.
      scored_on: any value but "allowed" scores policy and anchor on all codes.
    """
    allowed = problem["allowed"]
    sampler = jnp.asarray(problem["theta"])
    theta = sampler if theta is None else jnp.asarray(theta)
    weight = probabilities(sampler, allowed)

    # All batches of positive probability, [n, B].
    pairs = (batch or choices[0].clips_per_prompt) == 2
    rows = PAIRS if pairs else np.arange(len(CLIPS))[:, None]
    rows = rows if allowed is None else rows[np.asarray(weight[rows].prod(axis=1) > 0)]
    values = jnp.asarray(problem["values"])[contexts(CLIPS)] if values is None else values

    gradients = _gradients(
        choices,
        loss,
        (theta, sampler, jnp.asarray(problem["anchor"])),
        allowed if scored_on == "allowed" else None,
        (CLIPS[rows], jnp.asarray(problem["rewards"])[rows], jnp.asarray(values)[rows]),
    )
    weight = weight[rows].prod(axis=1)
    return [jnp.einsum("n,nij->ij", weight, gradient) for gradient in gradients]


@functools.partial(jax.jit, static_argnames=("choices", "loss"))
def _gradients(choices, loss, logits, allowed, batches):
    """Returns minus the loss's gradient for each choice and batch, [n, 21, V] each.

    Args:
      choices: PolicyGradients.
      loss: as `policy_gradient.policy_loss`.
      logits: of the policy being updated, the policy that sampled, and the anchor.
      allowed: bool [21, V], or None for all codes.
      batches: tokens [n, B, S], rewards [n, B] and values [n, B, S].
    """
    theta, sampler, anchor = logits

    def negative_loss(theta, tokens, rewards, values, choice):
        log_anchor = log_distribution(anchor, tokens, allowed)

        def scores(logits):
            return policy_gradient.scores(
                log_distribution(logits, tokens, allowed), log_anchor, tokens
            )

        values = values if choice.baseline == "value" else None
        advantage, _ = policy_gradient.advantage(choice, scores(sampler), rewards, values, STRENGTH)
        return -loss(choice, scores(theta), advantage, STRENGTH)[0]

    gradients = []
    for choice in choices:
        slope = jax.grad(functools.partial(negative_loss, choice=choice))
        gradients.append(jax.vmap(slope, in_axes=(None, 0, 0, 0))(theta, *batches))
    return gradients


# --- the table ---


def error(gradient, truth):
    """Returns the relative error in the Euclidean norm."""
    return float(np.linalg.norm(gradient - truth) / np.linalg.norm(truth))


def cosine(gradient, truth):
    """Returns the cosine of the angle between two gradients."""
    product = (gradient * truth).sum()
    return float(product / np.linalg.norm(gradient) / np.linalg.norm(truth))


def table(problem, truth):
    """Returns a Markdown table of relative errors and cosines of the first update.

    Clipped surrogates also have those of a second update on the same rollout.
    """
    moved = problem["theta"] + STEP * truth
    after = finite_difference(lambda theta: objective(theta, problem), moved)
    first, second = {}, {}
    for baselines in (("value",), tuple(x for x in policy_gradient.BASELINES if x != "value")):
        names = itertools.product(baselines, policy_gradient.SURROGATES, policy_gradient.KLS)
        choices = tuple(policy_gradient.PolicyGradient(*name, group=2) for name in names)
        for gradients, theta in ((first, None), (second, moved)):
            values = mean_gradients(choices, problem, theta)
            gradients.update(zip(choices, values, strict=True))

    kls = [f'kl="{kl_}"' for kl_ in policy_gradient.KLS]
    lines = [f"| baseline | surrogate | {' | '.join(kls)} |", "|---" * (2 + len(kls)) + "|"]
    rows = itertools.product(policy_gradient.BASELINES, policy_gradient.SURROGATES)
    for baseline, surrogate in rows:
        cells = [f"`{baseline}`", f"`{surrogate}`"]
        for kl_ in policy_gradient.KLS:
            choice = policy_gradient.PolicyGradient(baseline, surrogate, kl_, group=2)
            cell = _cell(first[choice], truth)
            if surrogate == "clipped":
                cell += f"; then {_cell(second[choice], after)}"
            cells.append(cell)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(gradient, truth):
    distance = error(gradient, truth)
    return "< 1e-7" if distance < 1e-7 else f"{distance:.2g} (cos {cosine(gradient, truth):.3f})"


def main():
    """Prints the table."""
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    with jax.enable_x64(True):
        inputs = problem()
        truth = finite_difference(lambda theta: objective(theta, inputs), inputs["theta"])
        print(table(inputs, truth))


if __name__ == "__main__":
    main()
