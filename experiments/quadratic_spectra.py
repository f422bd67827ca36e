"""Writes the eigenvalues of cases 1 and 2 of the quadratics from spectra that this package measured.

Reads results/gpt2_official (GPT-2 at initialisation, 124 M parameters) and results/js0_families (ResNet-18 at
initialisation, batch statistics), draws EACH eigenvalues from four blocks of each, as ``from_spectra`` does, and writes
hessian_tools/assets/quadratic_cases.json. Unshifted and unscaled: `ht.quadratic.case` does that.
"""

import json
from pathlib import Path

import hessian_tools as ht
from hessian_tools.quadratic.cases import drawn_eigenvalues

TARGET = Path(__file__).parent.parent / "hessian_tools" / "assets" / "quadratic_cases.json"
SOURCES = {
    "1": ("results/gpt2_official/result", "transformer.",
          ("h.0.attn.c_attn.weight[q]", "h.0.attn.c_attn.weight[v]", "h.0.attn.c_proj.weight",
           "h.0.mlp.c_proj.weight")),
    "2": ("results/js0_families/spectra/resnet18/result", "",
          ("layer1.0.conv2.weight", "layer2.0.conv2.weight", "layer3.0.conv2.weight", "layer4.0.conv2.weight")),
}  # fmt: skip
EACH, SEED = 30, 0


def main() -> None:
    written = {}
    for number, (path, prefix, names) in SOURCES.items():
        spectra = ht.load(path)["spectra"]
        drawn = {
            name: drawn_eigenvalues(spectra[prefix + name], EACH, "nodes", SEED, name)
            for name in names
        }
        rounded = {
            name: [float(f"{value:.6g}") for value in values] for name, values in drawn.items()
        }
        written[number] = {
            "source": f"{path}, {EACH} draws among the nodes, seed {SEED}",
            "eigenvalues": rounded,
        }
    TARGET.write_text(json.dumps(written, indent=1) + "\n")
    for number, kept in written.items():
        for name, values in kept["eigenvalues"].items():
            print(f"case {number}  {name:28s} {values[0]:.4g} to {values[-1]:.4g}")


if __name__ == "__main__":
    main()
