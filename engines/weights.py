"""Where downloaded weights lie, and what an engine says when they are not there.

``voice-clone models pull ENGINE`` puts the files of ``models/catalogue.yaml`` into ``weights_dir(ENGINE)``;
there an engine looks for them. It never downloads anything itself.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from engines.contract import EngineCard, LicenceNotAccepted, ModelError, ModelMissing

MODELS_DIR_VARIABLE = "VOICE_CLONE_MODELS_DIR"
#: Written into an engine's folder when the operator accepts the licence of its weights: which one, and when.
LICENCE_ACCEPTED = "LICENCE_ACCEPTED"

_CHECKOUT = Path(__file__).resolve().parents[1]


def models_dir() -> Path:
    """The folder all weights lie under: one folder in it for each engine.

    ``$VOICE_CLONE_MODELS_DIR`` if set, else ``models/`` of the checkout this runs from, else
    ``~/.local/share/voice-clone/models``. Raises ``ModelError`` if the variable is not an absolute path.
    """
    chosen = os.environ.get(MODELS_DIR_VARIABLE)
    if chosen:
        path = Path(chosen).expanduser()
        # A relative path would be another folder in every process that resolves it.
        if not path.is_absolute():
            raise ModelError(
                f"{MODELS_DIR_VARIABLE} is '{chosen}', which is not an absolute path.",
                next_step=f"Set it to '{path.resolve()}' or another absolute path.",
            )
        return path
    if (_CHECKOUT / "models" / "catalogue.yaml").is_file():
        return _CHECKOUT / "models"
    return Path.home() / ".local" / "share" / "voice-clone" / "models"


def weights_dir(engine: str) -> Path:
    """The folder the weights of ``engine`` lie in; it need not exist. Raises as ``models_dir`` does."""
    return models_dir() / engine


def pull_command(card: EngineCard) -> str:
    """What the operator types to get the weights. It asks for their licence to be accepted if need be."""
    return f"voice-clone models pull {card.name}"


def require_files(card: EngineCard, folder: Path, names: Iterable[str]) -> None:
    """Raise ``ModelMissing`` unless every one of ``names`` is a file in ``folder``."""
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise ModelMissing(
            f"The weights of '{card.name}' (licence: {card.weights_licence}) are not all in {folder}: "
            f"no {', '.join(missing)}.",
            next_step=f"Run '{pull_command(card)}', or set model_dir to the folder that has them.",
        )


def require_licence(card: EngineCard, folder: Path, *, accepted: bool) -> None:
    """Raise ``LicenceNotAccepted`` unless it was ``accepted`` in the settings, or with the download."""
    if not accepted and not (folder / LICENCE_ACCEPTED).is_file():
        raise LicenceNotAccepted(
            f"The weights of '{card.name}' are under the {card.weights_licence}, which nobody has accepted "
            "here.",
            next_step=f"Run '{pull_command(card)}', which says where to read it, "
            "or set accept_license: true.",
        )
