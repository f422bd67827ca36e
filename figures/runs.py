"""Draws the pictures of the runs whose results are committed, as the commands draw them.

`python figures/runs.py [FOLDER]` reads results only; with FOLDER the pictures come there, in
folders of the runs' names, and not into results/. A run's title is that of the picture it has.
"""

import sys
from pathlib import Path

from PIL import Image

import hessian_tools as ht
from hessian_tools.plots import partition, spectra, training

RESULTS = Path("results")
RUNS = {
    "gpt_nano": "block_spectra.png",
    "gpt2_official": "block_spectra.png",
    "partition_gpt2": "evidence.png",
    "race_gpt_nano": "curves.png",
    "race_mlp": "rates.png",
    "race_vgg_nano": "curves.png",
}


def main(folder: str = str(RESULTS)) -> None:
    for run, picture in RUNS.items():
        target = Path(folder) / run
        target.mkdir(parents=True, exist_ok=True)
        drawn(run, titled(RESULTS / run / picture), target)


def titled(picture: Path) -> str:
    """What a picture's title says of the run, without what it says of the picture."""
    with Image.open(picture) as image:
        return image.info["Title"].rsplit(": ", 1)[0]


def drawn(run: str, title: str, target: Path) -> list[Path]:
    """The pictures of a run, in the folder ``target``."""
    result = ht.load(RESULTS / run / "result")
    if "race" in result:
        return training.draw(target, result["race"], title)
    if "report" in result:
        return partition.draw(target, result["report"], result["drawn"], title)
    return spectra.draw(target, result["spectra"], result["heterogeneity"], title)


if __name__ == "__main__":
    main(*sys.argv[1:])
