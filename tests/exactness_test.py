"""How RL is proved right here: the known traps, each with a test that falls into it if we do.

`python -m pytest -m exactness` runs them all; the marker of a test names its rows.
"""

import ast
from pathlib import Path

ROWS = {
    1: "the mean gradient is that of the enumerated objective, whatever the baseline that sees the prefix alone",
    2: "a baseline that saw the action is caught",
    3: "the sampled log ratio as a loss has no gradient, and is caught",
    4: "the KL's gradient includes the KL still to come; what leaves it out is caught under the name exact",
    5: "ascent comes to anchor exp(R / beta) / Z",
    6: "KL and log ratio are 0 to the bit at step 0, at any temperature; scoring at another one is caught",
    7: "a filtered policy is the filtered distribution; scoring it on all codes is caught",
    8: "the sampler's log-probs are the learner's, in float64 and float32",
    9: "bfloat16 moves a log-prob by little",
    10: "scoring has no dropout",
    11: "keys depend on seed, step and global row: the same clips on 1 and 8 devices, in any batch, no two alike",
    12: "rewards reach the advantage as they are, each its own clip's",
    13: "equal rewards of a group give no advantage; one's own reward in the mean shrinks the gradient by (G - 1) / G",
    14: "a fitted value is the expected reward of the prefix",
    15: "accumulated and sharded updates are that of the whole batch",
    16: "the anchor's hash is in every checkpoint, and RU's is R's",
    17: "a run that was killed goes on as if nothing had happened",
    18: "windows and scales of the rewards are NumPy's, for short clips too",
    19: "the layout of tokens is a bijection, and the joint of a tiny clip sums to 1",
    20: "Bradley-Terry: swapped clips are the same vote, planted utilities come back, shuffled votes teach nothing",
    21: "the alarm finds the peak of a judge whom the reward leaves behind, and is silent where they agree",
    22: "corrupted audio ranks under the clean clip",
    23: "a reward that is not finite skips the update and is counted",
}


def marked():
    """(row, name of a test) for every marker in the tests."""
    for path in Path(__file__).parent.rglob("*_test.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                for mark in node.decorator_list:
                    if (
                        isinstance(mark, ast.Call)
                        and ast.unparse(mark.func) == "pytest.mark.exactness"
                    ):
                        yield from ((ast.literal_eval(row), node.name) for row in mark.args)


def test_every_row_has_a_test():
    assert {row for row, _ in marked()} == set(ROWS)
