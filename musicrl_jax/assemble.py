"""Folders of models -> a system: one folder whose system.json refers to them."""

from collections.abc import Mapping

from musicrl_jax.core import checkpoint, lock
from musicrl_jax.systems import folder


@lock.holds("out")
def assemble(out: str, parts: Mapping[str, str], kind: str = "musiclm") -> None:
    """Writes `out`/system.json; an equal one is left alone.

    Args:
      out: folder of the system.
      parts: folder of each model, by the name of the part: all that play, or all that encode.
      kind: of the system.

    Raises:
      ValueError: if the kind or a part's name is unknown, or the parts neither play nor encode.
      FileNotFoundError: if a part's folder holds no model.
    """
    system = folder.system_class(kind, out)
    if unknown := sorted(set(parts) - set(system.PARTS)):
        raise ValueError(
            f"assemble.parts: {kind} has no part {unknown[0]!r}, only {', '.join(system.PARTS)}"
        )
    uses = {"play": system.PLAYING, "encode": system.ENCODING}
    whole = [use for use, names in uses.items() if names and set(names) <= set(parts)]
    if not whole:
        needs = "; ".join(f"to {use}, {', '.join(names)}" for use, names in uses.items() if names)
        raise ValueError(
            f"assemble.parts has {', '.join(sorted(parts)) or 'none'}, and a system of kind {kind} "
            f"needs: {needs}"
        )
    for name, part in parts.items():
        if not checkpoint.has_model(part):
            raise FileNotFoundError(
                f"assemble.parts: {name} is {part!r}, which holds no model: train it, or name another"
            )
    changed = folder.write(out, kind, parts)
    done = f"assembled of {', '.join(sorted(parts))}" if changed else "assembled already"
    print(f"{out}: {done} (to {' and '.join(whole)})")
