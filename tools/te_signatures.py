"""What parameters Transformer Engine's operators take, read from the text of a release without installing it.

pip download --no-deps transformer-engine==2.11.0
python tools/te_signatures.py transformer_engine-2.11.0-py3-none-any.whl > tests/unit/te_signatures.json
"""

import ast
import json
import sys
import zipfile
from pathlib import Path

FILES = {
    "RMSNorm": "module/rmsnorm.py",
    "Linear": "module/linear.py",
    "LayerNormLinear": "module/layernorm_linear.py",
    "GroupedLinear": "module/grouped_linear.py",
    "DotProductAttention": "attention/dot_product_attention/dot_product_attention.py",
    "optimizers.FusedAdam": "optimizers/fused_adam.py",
}


def parameters(function: ast.FunctionDef) -> list[str]:
    """Without the first, which is the object; `**` stands for any name."""
    arguments = function.args
    names = [argument.arg for argument in [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]]
    return names[1:] + ["**"] * (arguments.kwarg is not None)


def main(wheel: str) -> None:
    found: dict[str, list[str]] = {}
    with zipfile.ZipFile(wheel) as archive:
        for name, file in FILES.items():
            tree = ast.parse(archive.read(f"transformer_engine/pytorch/{file}"))
            (body,) = (node.body for node in tree.body if isinstance(node, ast.ClassDef) and name.endswith(node.name))
            for node in body:
                if isinstance(node, ast.FunctionDef) and node.name in ("__init__", "forward"):
                    found[name if node.name == "__init__" else f"{name}.forward"] = parameters(node)
    print(json.dumps({"wheel": Path(wheel).name, "parameters": found}, indent=1))


if __name__ == "__main__":
    main(sys.argv[1])
