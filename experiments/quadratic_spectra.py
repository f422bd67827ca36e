"""Writes the eigenvalues of cases 1 and 2 of the quadratics, from spectra measured before.

Reads results/gpt2_official (GPT-2 at initialisation, 124 M parameters) and results/js0_families
(ResNet-18 at initialisation, batch statistics), draws EACH eigenvalues from four blocks of each, as
``from_spectra`` does, and writes hessian_tools/assets/quadratic_cases.json. Unshifted and unscaled:
`ht.quadratic.case` does that.
"""

import json
from pathlib import Path

import hessian_tools as ht
from hessian_tools.quadratic.cases import drawn_eigenvalues

TARGET = Path(__file__).parent.parent / "hessian_tools" / "assets" / "quadratic_cases.json"
# case -> result file, prefix of the blocks' names, blocks
SOURCES = {
    "1": (
        "results/gpt2_official/result",
        "transformer.",
        (
            "h.0.attn.c_attn.weight[q]",
            "h.0.attn.c_attn.weight[v]",
            "h.0.attn.c_proj.weight",
            "h.0.mlp.c_proj.weight",
        ),
    ),
    "2": (
        "results/js0_families/spectra/resnet18/result",
        "",
        (
            "layer1.0.conv2.weight",
            "layer2.0.conv2.weight",
            "layer3.0.conv2.weight",
            "layer4.0.conv2.weight",
        ),
    ),
}
EACH, SEED = 30, 0


def eigenvalues(path: str, prefix: str, names: tuple[str, ...]) -> dict[str, list[float]]:
    """EACH eigenvalues of every block, to six digits."""
    spectra = ht.load(path)["spectra"]
    chosen = {}
    for name in names:
        values = drawn_eigenvalues(spectra[prefix + name], EACH, "nodes", SEED, name)
        chosen[name] = [float(f"{value:.6g}") for value in values]
    return chosen


def main() -> None:
    written = {}
    for number, (path, prefix, names) in SOURCES.items():
        written[number] = {
            "source": f"{path}, {EACH} draws among the nodes, seed {SEED}",
            "eigenvalues": eigenvalues(path, prefix, names),
        }
    TARGET.write_text(json.dumps(written, indent=1) + "\n")
    for number, kept in written.items():
        for name, values in kept["eigenvalues"].items():
            print(f"case {number}  {name:28s} {values[0]:.4g} to {values[-1]:.4g}")


if __name__ == "__main__":
    main()
