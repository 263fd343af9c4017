#!/usr/bin/env bash
# gin-config 0.5.0 rejects a misspelt parameter and a misspelt configurable, but silently accepts a
# misspelt macro and a misspelt scope: the old value stays in use. In T5X's style every size and
# path is a macro and every stage a scope, so most typing errors are silent.
# Remedy: after parsing, compare the bound macros and scopes with those that are referenced.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet gin-config==0.5.0
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import gin


@gin.configurable
def train(steps=1):
    return steps


recipe = "STEPS = 10\ntrain.steps = %STEPS\npolicy/train.steps = 20"
outcomes = {}
for name, line in {
    "parameter": "train.stepz = 99",
    "configurable": "trian.steps = 99",
    "macro": "STEPZ = 99",
    "scope": "polcy/train.steps = 99",
}.items():
    gin.clear_config()
    try:
        gin.parse_config(f"{recipe}\n{line}")
        with gin.config_scope("policy"):
            scoped = train()
        outcomes[name] = f"taken; train() gives {train()}, in its scope {scoped}"
    except ValueError as error:
        outcomes[name] = f"refused: {str(error).splitlines()[0][:70]}"
    print(f"misspelt {name}: {outcomes[name]}")
sys.exit([outcome.startswith("taken") for outcome in outcomes.values()] != [False, False, True, True])
PYTHON
# Output:
#   misspelt parameter: refused: Configurable 'train' doesn't have a parameter named 'stepz'.
#   misspelt configurable: refused: No configurable matching 'trian'.
#   misspelt macro: taken; train() gives 10, in its scope 20
#   misspelt scope: taken; train() gives 10, in its scope 20
