"""``prefenv play``: be the oracle."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path

from prefenv.errors import ConfigError
from prefenv.play.records import PlayConfig
from prefenv.registry import lookup, names, parse


@dataclass(frozen=True)
class Play(PlayConfig):
    """Be the oracle: look at what model A makes, say what you like, and see model B learn it.

    You see samples of model A (red), then numbered proposals. Type the numbers of those you like (0 3), Enter if
    none will do, or p 0.1 0.2 0 0.7 for how much you like each; u takes the last answer back, s skips, q quits.
    After each answer you see what model B (green) makes of the same noises, and new samples of it. Three answers
    are usually enough. Every answer is on the disk before it is acknowledged; the same command goes on.

    Example: prefenv play --agent learned-reward --oracle terminal --seed 0

    Args:
        oracle: Where you answer: terminal (drawn in text, works over ssh), window (matplotlib: keys and clicks) or
            web (a page for one or several people). Settings may follow the name, web:panels=3,overlap=2.
        out: The episode's folder; default: runs/ and a name that hashes the settings. An episode in it goes on.
        json: Print the closing summary as one JSON object, and nothing else, on stdout; the rest goes to stderr.
    """

    oracle: str = "terminal"
    out: Path | None = None
    json: bool = False

    def run(self) -> int:
        """Play it."""
        from prefenv.play.episode import Episode

        name, settings = parse(self.oracle)
        face = lookup("oracle", name)
        if not hasattr(face, "play"):
            able = [n for n in names("oracle") if hasattr(lookup("oracle", n), "play")]
            raise ConfigError(f"oracle {name!r} is no person's: choose one of {', '.join(able)}")
        fields = [f.name for f in dataclasses.fields(PlayConfig)]
        config = PlayConfig(**{name: getattr(self, name) for name in fields})
        folder, out = self.out or default_folder(config), sys.stderr if self.json else sys.stdout
        print(f"Getting ready; all is kept in {folder}", file=out, flush=True)
        with Episode(config, folder) as episode:
            try:
                summary = face.play(episode, out=out, **settings)
            except TypeError as error:
                if "unexpected keyword argument" not in str(error):
                    raise
                raise ConfigError(f"oracle {self.oracle!r}: {error}") from None
        if self.json:
            print(json.dumps(summary))
        return 0


def default_folder(config: PlayConfig) -> Path:
    """``runs/play-AGENT-TASK-sSEED-HASH``."""
    digest = hashlib.sha256(json.dumps(config.record(), sort_keys=True).encode()).hexdigest()[:8]
    agent, task = (parse(t)[0].rpartition(":")[2] for t in (config.agent, config.task))
    return Path("runs") / f"play-{agent}-{task}-s{config.seed}-{digest}"
