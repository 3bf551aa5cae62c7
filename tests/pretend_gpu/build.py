"""Make an environment with a CUDA build of torch in which CUDA's libraries are pretended.

    python tests/pretend_gpu/build.py ENV [--torch 2.11.0 --transformers 5.17.0]
    ENV/pretend-gpu python -m pytest -m pretend_gpu tests/pretend_gpu

libcudart, libcublas, libcublasLt, libnccl, libcuda and libnvidia-ml are replaced in that environment alone: device
memory is address space of the host, copies are copies, kernels are counted and do nothing. All above is real: torch's
dispatch and host-side checks, the caching allocator, streams, FSDP2, inductor, Triton and ptxas. What a kernel computes
is not there: no value means anything. Needs gcc, binutils, the CUDA headers, and about 6 GB for the wheels.

PRETEND_GPU_GIB sets the memory (79.1), PRETEND_GPU_DEVICES the number of devices (1), PRETEND_GPU_NAME their name.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
PROJECT = HERE.parents[1]
LIBRARIES = {
    "nvidia/cu13/lib/libcudart.so.13": "cudart.c",
    "nvidia/cu13/lib/libcublas.so.13": "cublas.c",
    "nvidia/cu13/lib/libcublasLt.so.13": "cublaslt.c",
    "nvidia/nccl/lib/libnccl.so.2": "nccl.c",
}
DRIVER = {"libcuda.so.1": ("driver.c", "driver_rest.c"), "libnvidia-ml.so.1": ("nvml.c",)}
"""What a machine with a GPU has outside of the environment."""
PACKAGES = ("peft", "bitsandbytes", "pyarrow", "typer", "rich", "safetensors", "matplotlib", "jinja2", "fsspec")
TEST_PACKAGES = ("pytest", "pytest-timeout", "hypothesis", "scipy", "scikit-learn")
CUDA_HEADERS = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "include"


def main() -> None:
    """Make the environment, put the stand-ins there, and a program that runs others on them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("env", type=Path, help="the environment to make")
    parser.add_argument("--torch", default="2.11.0", help="version of torch")
    parser.add_argument("--transformers", default="5.17.0", help="version of transformers")
    asked = parser.parse_args()
    env = asked.env.absolute()
    install(env, asked.torch, asked.transformers)
    site = next((env / "lib").glob("python3*")) / "site-packages"
    build(site, env / "pretended")
    launcher = env / "pretend-gpu"
    launcher.write_text(
        "#!/bin/sh\n"
        f'export LD_LIBRARY_PATH="{env}/pretended" PATH="{env}/bin:$PATH"\n'
        f'export PYTHONPATH="{PROJECT}/core:{PROJECT}/cli:{PROJECT}" TORCHINDUCTOR_COMPILE_THREADS=1 HF_HUB_OFFLINE=1\n'
        'exec "$@"\n'
    )
    launcher.chmod(0o755)
    check = "import torch; print(torch.__version__, torch.cuda.get_device_name())"
    subprocess.run([launcher, "python", "-c", check], check=True)


def install(env: Path, torch: str, transformers: str) -> None:
    """Install torch from the package index itself: other places may have a build for the CPU."""
    subprocess.run([sys.executable, "-m", "venv", env], check=True)
    pip = [env / "bin" / "pip", "install", "--quiet", "--disable-pip-version-check"]
    index = {**os.environ, "PIP_FIND_LINKS": "", "PIP_CONFIG_FILE": os.devnull}
    subprocess.run([*pip, "--no-deps", "--only-binary", ":all:", f"torch=={torch}"], env=index, check=True)
    subprocess.run([*pip, f"torch=={torch}", f"transformers=={transformers}", *PACKAGES, *TEST_PACKAGES], check=True)


def build(site: Path, target: Path) -> None:
    """Compile the stand-ins and put each where the real library was, which is kept beside it as *.real."""
    target.mkdir(exist_ok=True)
    include = ["-I", CUDA_HEADERS, "-I", site / "nvidia/nccl/include", "-I", site / "nvidia/cu13/include"]
    for library, source in LIBRARIES.items():
        real = site / library
        original = real.with_name(real.name + ".real")
        if not original.exists():
            shutil.copy(real, original)
        made = compile_library(original, real.name, HERE / source, target, include)
        real.unlink()
        shutil.copy(made, real)
    for name, sources in DRIVER.items():
        paths = [HERE / source for source in sources]
        run("gcc", "-shared", "-fPIC", "-O1", "-w", *include, "-o", target / name, *paths, "-ldl", soname(name))


def compile_library(original: Path, name: str, source: Path, target: Path, include: list[object]) -> Path:
    """A library with all symbols of the original: those that the source defines, and empty functions for the others."""
    compiled, rest = target / f"{source.stem}.o", target / f"{source.stem}_rest"
    run("gcc", "-c", "-fPIC", "-O1", "-w", *include, "-o", compiled, source)
    defined = {line.split()[-1] for line in output("nm", "--defined-only", "-g", compiled).splitlines() if line}
    exported = exported_symbols(original)
    missing = [symbol for symbol in exported if symbol not in defined and re.fullmatch(r"\w+", symbol)]
    rest.with_suffix(".c").write_text("".join(f"int {symbol}(void) {{ return 0; }}\n" for symbol in missing))
    run("gcc", "-c", "-fPIC", "-w", "-o", rest.with_suffix(".o"), rest.with_suffix(".c"))
    options: list[object] = ["-ldl", "-lpthread", soname(name)]
    if versions := sorted({version for version in exported.values() if version}):
        script = target / f"{source.stem}.map"
        script.write_text(f"{versions[0]} {{ global: *; }};\n")
        options.append(f"-Wl,--version-script={script}")
    made = target / name
    run("gcc", "-shared", "-o", made, compiled, rest.with_suffix(".o"), *options)
    return made


def exported_symbols(library: Path) -> dict[str, str]:
    """Symbol -> its version, of all functions and objects that a library offers."""
    symbols: dict[str, str] = {}
    for line in output("readelf", "-W", "--dyn-syms", library).splitlines():
        parts = line.split()
        if len(parts) >= 8 and parts[6] != "UND" and parts[3] in ("FUNC", "OBJECT"):
            name, _, version = parts[7].partition("@")
            if not name.startswith(("_init", "_fini")):
                symbols[name] = version.lstrip("@")
    return symbols


def soname(name: str) -> str:
    """The linker's flag for a library's own name."""
    return f"-Wl,-soname,{name}"


def run(*command: object) -> None:
    """Run a program that must succeed."""
    subprocess.run([str(part) for part in command], check=True)


def output(*command: object) -> str:
    """What a program prints."""
    return subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True).stdout


if __name__ == "__main__":
    main()
