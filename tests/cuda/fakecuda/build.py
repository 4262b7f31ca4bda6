"""Build the fake driver, and the two modules of CuPy that have NVIDIA's runtime within them, without it.

Those two are compiled from CuPy's own sdist of the installed version. All is kept under a hash of what went into it, and
made in a folder of its own first, so that processes that build at the same time do not meet.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).parent
CXX = os.environ.get("CXX") or "g++"
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
TOOLS = (
    "cython>=3.2,<3.3",
    "setuptools>=77",
    "nvidia-cuda-runtime>=13,<14",
    "nvidia-cuda-crt>=13,<14",
    "nvidia-cuda-profiler-api>=13,<14",
)
MODULES = {"cupy_backends.cuda.api.runtime": (), "cupy.cuda.thrust": ("driver/thrust.cpp",)}
# What CuPy's own build says: install/cupy_builder/_command.py of the sdist
CONSTANTS = {
    "CUPY_USE_CUDA_PYTHON": False,
    "CUPY_CUFFT_STATIC": False,
    "CUPY_CYTHON_VERSION": "'3.2'",
    "CUPY_CUDA_VERSION": 13000,
    "CUPY_HIP_VERSION": 0,
}
DIRECTIVES = "embedsignature=True,c_api_binop_methods=True,binding=False,freethreading_compatible=True"


class Unavailable(RuntimeError):  # noqa: N818 - reads as what it says
    """The fake cannot be had here; the message says what it needs, as tests/needs.py wants it said."""


def cupy() -> tuple[str, str]:
    """Return the name and the version of the CuPy that is installed."""
    for name in ("cupy-cuda13x", "cupy-cuda12x"):
        try:
            return name, importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            pass
    raise Unavailable("needs CuPy's wheel, to run it on a fake driver: pip install 'swl[test-cuda]'")


def folder() -> Path:
    """Return where builds and compiled kernels are kept between runs."""
    root = os.environ.get("SWL_FAKECUDA_CACHE")
    found = Path(root) if root else Path(tempfile.gettempdir()) / f"swl-fakecuda-{os.getuid()}"
    found.mkdir(parents=True, exist_ok=True, mode=0o700)
    if found.stat().st_uid != os.getuid():
        raise Unavailable(f"needs CuPy in a folder of its own, but {found} is another user's; set SWL_FAKECUDA_CACHE")
    return found


def digest(*parts: object) -> str:
    """Return a hash of texts and of the contents of files."""
    made = hashlib.sha256()
    for part in parts:
        made.update((part.read_bytes() if isinstance(part, Path) else str(part).encode()) + b"\0")
    return made.hexdigest()[:20]


def run(*command: object, env: dict[str, str] | None = None, cwd: Path | None = None) -> str:
    """Run a command; its output if it fails."""
    done = subprocess.run(
        [str(c) for c in command],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **(env or {})},
        cwd=cwd,
    )
    if done.returncode:
        words = f"{' '.join(map(str, command))[:300]} ended with {done.returncode}: {done.stderr[-2000:]}"
        raise Unavailable(f"needs CuPy on a fake driver, which cannot be built here: {words}")
    return done.stdout


def kept(name: str, make: Callable[[Path], None]) -> Path:
    """Return the folder `name`, filled by `make` now or before, by this process or another one."""
    target = folder() / name
    with (folder() / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.is_dir():
            with tempfile.TemporaryDirectory(dir=folder()) as scratch:
                made = Path(scratch) / name
                made.mkdir()
                make(made)
                made.rename(target)
    return target


def tools() -> Path:
    """Return a folder with Cython and CUDA's headers."""
    return kept(
        f"tools-{digest(TOOLS, sys.version)}",
        lambda to: run(sys.executable, "-m", "pip", "install", "-q", "--target", to, *TOOLS) and None,
    )


def _cupys_modules(to: Path) -> None:
    version, python = cupy()[1], {"PYTHONPATH": str(tools()), "CUPY_INSTALL_USE_STUB": "1"}
    pip = (sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", "cupy", "--no-build-isolation")
    run(*pip, f"cupy=={version}", "-d", to, env=python)
    (archive,) = to.glob("cupy-*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(to, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))  # not before 3.11.4
    source = to / f"cupy-{version}"
    (source / "thrust").mkdir()  # thrust.pyx asks for the version alone
    (source / "thrust" / "version.h").write_text("#define THRUST_VERSION 200000\n")
    constants = [word for name, value in CONSTANTS.items() for word in ("-E", f"{name}={value}")]
    for module, extra in MODULES.items():
        pyx = module.replace(".", "/") + ".pyx"
        run(
            sys.executable, "-m", "cython", "-3", "--cplus", "-w", source, *constants, "-X", DIRECTIVES, pyx, env=python
        )
        cpp = (source / pyx).with_suffix(".cpp")
        places = [includes(), sysconfig.get_paths()["include"], cpp.parent, source, source / "cupy_backends"]
        flags = ("-std=c++17", "-O1", "-w", "-shared", "-fPIC", "-D_FORCE_INLINES=1")
        out = to / f"{module}{SUFFIX}"
        run(CXX, *flags, *(f"-I{place}" for place in places), cpp, *(HERE / e for e in extra), "-o", out)
    shutil.rmtree(source)
    archive.unlink()


def includes() -> Path:
    """Return the folder of CUDA's headers."""
    return next(tools().glob("nvidia/*/include"))


def cupys_modules() -> Path:
    """Return the folder of the two modules of CuPy."""
    parts = (cupy(), TOOLS, sys.version, SUFFIX, CXX, CONSTANTS, HERE / "driver/thrust.cpp")
    return kept(f"cupy-{digest(*parts)}", _cupys_modules)


def wheels_libraries() -> list[Path]:
    """Return the compiled modules of CuPy that are linked to a library of CUDA's."""
    site = Path(str(importlib.metadata.distribution(cupy()[0]).locate_file("")))
    return sorted(site.glob("cupy_backends/cuda/libs/cu[br]*.so"))


def _undefined(library: Path) -> set[str]:
    symbols = run("nm", "-D", "--undefined-only", library)
    return set(re.findall(r"\bU ((?:cuda|cublas|curand)[A-Z]\w*)", symbols))


def _driver(to: Path) -> None:
    lib = to / "libfakecuda.so"
    members = "\n".join(_members(n) for n in range(1, 49))
    shutil.copytree(HERE / "include", to / "include")
    (to / "include" / "fake_members.h").write_text(
        "template <size_t N, typename S, typename F> void fake_members(S& s, const F& f) {\n" + members + "\n}\n"
    )
    sources = [HERE / "driver" / f"{name}.cpp" for name in SOURCES]
    shared = (CXX, "-std=c++17", "-O2", "-w", "-shared", "-fPIC")
    run(*shared, f"-I{includes()}", *sources, "-o", lib, "-Wl,-soname,libfakecuda.so", "-ldl")
    wheel = wheels_libraries()
    wanted = set().union(*map(_undefined, [*wheel, *cupys_modules().glob("*.so")]))
    missing = wanted - set(re.findall(r"\bT (\w+)", run("nm", "-D", "--defined-only", lib)))
    # "not supported" of the runtime and of the other two
    stubs = "".join(
        f"int {name}() {{ return {801 if name.startswith('cuda') else 15}; }}\n" for name in sorted(missing)
    )
    (to / "stubs.c").write_text(stubs)
    names = {name for so in wheel for name in re.findall(r"NEEDED.*\[(libcu\S+)\]", run("readelf", "-d", so))}
    major = re.search(r"cuda(\d+)x", cupy()[0])[1]
    names |= {"libcuda.so.1", *(f"lib{name}.so.{major}" for name in ("cudart", "nvrtc", "cublasLt"))}
    for name in names:
        rest = to / "stubs.c" if "cudart" in name or "cublas" in name or "curand" in name else "/dev/null"
        link = (f"-Wl,-soname,{name}", "-Wl,--no-as-needed", f"-L{to}", "-lfakecuda", "-Wl,-rpath,$ORIGIN")
        run(CXX, "-x", "c", "-w", "-shared", "-fPIC", rest, "-x", "none", "-o", to / name, *link)


SOURCES = ("runtime", "streams", "memory", "modules", "scheduler", "nvrtc", "cublas")


def _members(n: int) -> str:
    names = ", ".join(f"m{i}" for i in range(n))
    return f"  if constexpr (N == {n}) {{ auto& [{names}] = s; f({names}); }}"


def check() -> None:
    """Raise `Unavailable` if it is plain that nothing can be built here."""
    if shutil.which(CXX) is None:
        raise Unavailable(f"needs a C++ compiler: {CXX} is not on the PATH (apt install g++, or set CXX)")
    cupy()
    if sys.platform != "linux" or os.uname().machine != "x86_64":
        raise Unavailable("needs CuPy on a fake driver, which there is for Linux on x86-64 only")


def driver() -> Path:
    """Return the folder of the fake driver."""
    sources = sorted(p for p in HERE.rglob("*") if p.suffix in (".cpp", ".h", ".py"))
    return kept(f"driver-{digest(cupys_modules().name, *sources)}", _driver)
