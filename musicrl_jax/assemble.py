"""Assembles folders of models into a system: a folder whose system.json refers to them."""

from collections.abc import Mapping

from musicrl_jax.core import checkpoint, lock
from musicrl_jax.systems import folder


@lock.holds("out")
def assemble(out: str, parts: Mapping[str, str], kind: str = "musiclm") -> None:
    """Writes `out`/system.json, unless it has the same content already.

    Args:
      out: folder of the system.
      parts: folder of each model, by the part's name: all parts that play, or all that encode.
      kind: kind of the system.

    Raises:
      ValueError: if the kind or a part's name is unknown, or parts are missing.
      FileNotFoundError: if the folder of a part has no model.
    """
    # The kind must have the parts.
    system = folder.system_class(kind, out)
    if unknown := sorted(set(parts) - set(system.PARTS)):
        raise ValueError(
            f"assemble.parts: {kind} has no part {unknown[0]!r}, only {', '.join(system.PARTS)}"
        )

    # The parts must be enough for a use.
    needs = {"play": system.PLAYING, "encode": system.ENCODING}
    needs = {use: names for use, names in needs.items() if names}
    uses = [use for use, names in needs.items() if set(names) <= set(parts)]
    if not uses:
        missing = "; ".join(f"to {use}, {', '.join(names)}" for use, names in needs.items())
        raise ValueError(
            f"assemble.parts has {', '.join(sorted(parts)) or 'none'}, and a system of kind {kind} "
            f"needs: {missing}"
        )

    # The parts must be trained already.
    for name, part in parts.items():
        if not checkpoint.has_model(part):
            raise FileNotFoundError(
                f"assemble.parts: {name} is {part!r}, which holds no model: train it, or name "
                "another folder"
            )

    changed = folder.write(out, kind, parts)
    status = f"assembled of {', '.join(sorted(parts))}" if changed else "assembled already"
    print(f"{out}: {status} (to {' and '.join(uses)})")
