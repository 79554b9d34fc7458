"""Climb the ladders of kernels: build each rung, hold it to the truth, count what it does.

python -m lessons.kernels softmax
python -m lessons.kernels my_softmax.cu
python -m lessons.kernels check lessons/kernels/exercises/01_race.cu
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path

from fastgpt.config import UserError
from lessons.kernels import check, show
from lessons.kernels.climb import Outcome, climb
from lessons.kernels.rung import LANGUAGES, Rung, RungError, ladder, read_rung
from lessons.kernels.tasks import LADDERS

FIGURE = Path("runs", "climb.png")


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: see ``--help``.

    Returns:
        0; 1 where a rung is wrong or breaks a promise, or an exercise is not done.
    """
    parser = argparse.ArgumentParser(prog="python -m lessons.kernels", description=__doc__.splitlines()[0])
    parser.add_argument(
        "what",
        nargs="+",
        metavar="LADDER or FILE",
        help=f"{', '.join(LADDERS)}, all, or a file: a rung, or your own; or check and files: exercises",
    )
    parser.add_argument("--only", choices=sorted(LANGUAGES.values()), help="the rungs of one language")
    parser.add_argument("--out", type=Path, default=FIGURE, help=f"the figure of the climb (default: {FIGURE})")
    args = parser.parse_args(argv)
    try:
        if args.what[0] == "check":
            return check.main([Path(name) for name in args.what[1:]])
        if args.out.suffix not in (".png", ".svg", ".pdf"):
            raise UserError(f"{args.out}: the picture must be a .png, .svg or .pdf file")
        rungs = _chosen(args.what, args.only)
        outcomes = _climb(rungs)
        if len(outcomes) > 1:
            show.figure(outcomes, args.out)
            print(f"the climb is drawn in {args.out}")
    except (UserError, RungError, OSError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        return 130
    return 0 if all(outcome.good for outcome in outcomes) else 1


def _chosen(names: Sequence[str], only: str | None) -> list[Rung]:
    rungs: list[Rung] = []
    for name in names:
        if name == "all":
            rungs += [rung for each in LADDERS for rung in ladder(each)]
        elif name in LADDERS:
            rungs += ladder(name)
        elif Path(name).exists():
            rungs.append(read_rung(Path(name)))
        else:
            raise UserError(f"{name!r} is neither a ladder ({', '.join(LADDERS)}, all) nor a file")
    rungs = [rung for rung in rungs if only in (None, rung.language)]
    if not rungs:
        raise UserError(f"there is no rung in {only} among them")
    return rungs


def _climb(rungs: Sequence[Rung]) -> list[Outcome]:
    console = show.console()
    outcomes: list[Outcome] = []
    for _, group in itertools.groupby(rungs, key=lambda rung: (rung.path.parent, rung.language)):
        # A rung is told of as soon as it has run: of a whole ladder that is a while before the table.
        climbed = climb(list(group), lambda outcome: print(f"{outcome.rung.stem} has run", file=sys.stderr))
        show.report(climbed, console)
        outcomes += climbed
    return outcomes


if __name__ == "__main__":
    sys.exit(main())
