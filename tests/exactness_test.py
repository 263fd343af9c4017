"""The table of what makes RL exact: known mistakes, each with a test that fails if they are made.

`python -m pytest -m exactness` runs these tests; a test's marker names its rows.
"""

import ast
from pathlib import Path

ROWS = {
    1: "the mean gradient equals the enumerated objective's, with any baseline of the prefix",
    2: "a baseline that sees the action is caught",
    3: "the sampled log ratio as a loss has no gradient, and is caught",
    4: "the KL's gradient has the future KL; estimates without it are caught",
    5: "ascent reaches anchor exp(R / beta) / Z",
    6: "KL and log ratio are 0 to the bit at step 0 at any temperature; another one is caught",
    7: "a filtered policy is the filtered distribution; scoring it on all codes is caught",
    8: "the sampler's log-probs are the learner's, in float64 and float32",
    9: "bfloat16 changes a log-prob by little",
    10: "scoring has no dropout",
    11: "keys depend on seed, step and global row: equal clips on 1 and 8 devices, in any batch",
    12: "rewards reach the advantage unchanged, each for its own clip",
    13: "equal rewards in a group give no advantage; the own reward shrinks it by (G - 1) / G",
    14: "a fitted value is the expected reward of the prefix",
    15: "accumulated and sharded updates equal that of the whole batch",
    16: "the anchor's hash is in every checkpoint, and RU's is R's",
    17: "a killed run continues as if it had not been killed",
    18: "windows and scales of the rewards are NumPy's, also for short clips",
    19: "the layout of tokens is a bijection, and the joint of a tiny clip sums to 1",
    20: "Bradley-Terry: swapped clips, planted utilities, shuffled votes",
    21: "the alarm finds where the judge's score peaks while the reward still rises",
    22: "corrupted audio ranks below the clean clip",
    23: "a reward that is not finite skips the update and is counted",
    24: "tokens of every place have the frequencies that are scored; others' are caught",
}


def marked_rows():
    """Yields the rows of every exactness marker in the tests."""
    for path in Path(__file__).parent.rglob("*_test.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            for mark in getattr(node, "decorator_list", ()):
                if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.exactness":
                    yield from map(ast.literal_eval, mark.args)


def test_every_row_has_a_test():
    assert set(marked_rows()) == set(ROWS)
