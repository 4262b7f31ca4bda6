"""The command ``swl``: ``swl train``, ``swl plan``, ``swl bench``, ``swl warmup`` and ``swl info``."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

import swl
from swl import distributed
from swl.backends import active, get
from swl.backends.host.memory import MEMORY
from swl.demos import data as datasets
from swl.demos import text
from swl.demos import train as training
from swl.demos.train import Settings
from swl.distributed import cost
from swl.distributed.comm import from_rank_0, gather_numbers, launched
from swl.nn.gradcheck import GradientReport
from swl.ops.chunks import DEFAULT_BUDGET
from swl.warmup import DTYPES

__all__ = ["main"]


class _Refused(Exception):  # noqa: N818 - it never leaves this module
    """What the user asked for cannot be done; the message is all they need."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    of_text = arguments[:2] == ["train", "text"]  # a command of its own, with options of its own
    options = _text_parser().parse_args(arguments[2:]) if of_text else _parser().parse_args(arguments)
    try:
        return int(options.run(options))
    except (_Refused, swl.BackendUnavailable) as error:
        print(f"swl: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("swl: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="swl", description="Affine, softmax and cross-entropy on NumPy, Numba and CUDA.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"swl {swl.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    info = commands.add_parser("info", help="versions, backends and why each is or is not usable", allow_abbrev=False)
    info.set_defaults(run=_info)

    warm = commands.add_parser(
        "warmup", help="compile now what a training loop will call, and keep it on disk", allow_abbrev=False
    )
    warm.add_argument("--dtype", action="append", choices=DTYPES, help="may be repeated; float32 by default")
    warm.add_argument("--backend", metavar="NAME", help="one of those that `swl info` lists")
    warm.set_defaults(run=_warmup)

    bench = commands.add_parser(
        "bench", help="times beside the floors, and beside PyTorch, JAX and NumPy", allow_abbrev=False
    )
    bench.add_argument(
        "groups", nargs="*", metavar="GROUP", help="what to compare; losses and forward by default, or all"
    )
    bench.add_argument(
        "--rounds", type=_at_least(int, 1), default=3, metavar="N", help="blocks of each contender (%(default)s)"
    )
    bench.add_argument("--plot", type=Path, metavar="FILE", help="draw the time per logit over the classes instead")
    bench.set_defaults(run=_bench)

    _add_plan(commands)

    defaults = Settings()
    train = commands.add_parser(
        "train",
        help="train a classifier; `swl train text`: a language model",
        description="Train Affine, ReLU, Affine, SoftmaxWithLoss; the last line printed is the test accuracy.",
        epilog="`swl train text` trains a language model with the fused head; see `swl train text --help`.",
        allow_abbrev=False,
    )
    what = train.add_mutually_exclusive_group(required=True)
    what.add_argument("dataset", nargs="?", choices=["digits"], help="1,797 handwritten digits, from scikit-learn")
    what.add_argument("--data", type=Path, metavar="FILE.npz", help="your own arrays x (N, ...) and t (N,) or (N, C)")
    train.add_argument(
        "--backend", metavar="NAME", help="one of those that `swl info` lists; by default SWL_BACKEND, else numba"
    )
    train.add_argument(
        "--hidden",
        type=_at_least(int, 1),
        default=defaults.hidden,
        metavar="N",
        help="units of the hidden layer (%(default)s)",
    )
    train.add_argument(
        "--epochs",
        type=_at_least(int, 1),
        default=defaults.epochs,
        metavar="N",
        help="passes over the training rows (%(default)s)",
    )
    train.add_argument(
        "--batch-size",
        type=_at_least(int, 1),
        default=defaults.batch_size,
        metavar="N",
        help="rows per step (%(default)s)",
    )
    train.add_argument(
        "--lr",
        type=_at_least(float, 0),
        default=defaults.lr,
        metavar="X",
        help="learning rate at the start (%(default)s)",
    )
    train.add_argument(
        "--seed",
        type=_at_least(int, 0),
        default=defaults.seed,
        metavar="N",
        help="of initial weights and row order (%(default)s)",
    )
    train.add_argument(
        "--dtype", choices=["float64", "float32"], default=defaults.dtype, help="of parameters and inputs (%(default)s)"
    )
    train.add_argument(
        "--scale",
        choices=["all", "each"],
        help="scale inputs all alike, or each feature; by default digits all, --data each",
    )
    _add_ranks(train)
    train.add_argument("--plot", type=Path, metavar="FILE", help="save a picture of loss and accuracy")
    train.add_argument("--save", type=Path, metavar="FILE", help="save the parameters, as .npz")
    train.set_defaults(run=_train)
    return parser


def _add_ranks(train: Any) -> None:
    train.add_argument(
        "--class-parallel",
        type=_at_least(int, 1),
        metavar="N",
        help="spread the classes over N ranks, under mpiexec; the other ranks share the rows of each batch",
    )
    train.add_argument(
        "--checkpoint", type=Path, metavar="FOLDER", help="save after each epoch, and go on from the last one there"
    )


def _add_plan(commands: Any) -> None:
    plan = commands.add_parser(
        "plan",
        help="what a step of a head over many ranks costs",
        description="Print memory, work, bytes and time per rank of a step of ClassParallelHead (docs/scale.md).",
        allow_abbrev=False,
    )
    for name, what in (("rows", "rows of the whole batch"), ("inputs", "inputs of the head"), ("classes", "classes")):
        plan.add_argument(f"--{name}", type=_at_least(int, 1), required=True, metavar="N", help=what)
    plan.add_argument("--ranks", type=_at_least(int, 1), metavar="N", help="ranks in all; by default those of mpiexec")
    plan.add_argument(
        "--class-parallel", type=_at_least(int, 1), metavar="N", help="ranks that share the classes; by default all"
    )
    plan.add_argument(
        "--memory-budget",
        type=_at_least(int, 1),
        default=DEFAULT_BUDGET,
        metavar="BYTES",
        help="working memory of a rank (%(default)s)",
    )
    for name, unit in (
        ("flops", "flop/s of the products of a rank"),
        ("logits", "logits/s that a rank turns into losses and gradients"),
        ("bandwidth", "bytes/s that a rank sends in a collective"),
        ("latency", "seconds of an empty collective"),
    ):
        plan.add_argument(f"--{name}", type=_at_least(float, 0), metavar="X", help=f"{unit}; measured if not given")
    plan.add_argument("--measure", action="store_true", help="also run the step, on the ranks of mpiexec")
    plan.set_defaults(run=_plan)


def _at_least(number: type[int] | type[float], low: float) -> Callable[[str], float]:
    def parse(text: str) -> float:
        value = number(text)
        if not low <= value < float("inf"):  # a NaN fails too
            raise argparse.ArgumentTypeError(f"must be finite and at least {low}, got {text}")
        return value

    parse.__name__ = number.__name__  # argparse names it where `text` is no number
    return parse


# ------------------------------------------------------------------------------------------------ swl train


def _train(options: argparse.Namespace) -> int:
    return _alone_or_on_ranks(
        options, lambda comm: _prepare(options), lambda prepared, grid: _run_training(prepared, options, grid)
    )


def _alone_or_on_ranks(
    options: argparse.Namespace, prepare: Callable[[Any], Any], work: Callable[[Any, distributed.Grid | None], int]
) -> int:
    """Prepare and work in this process alone, or on the ranks of mpiexec, for which rank 0 speaks.

    What is wrong on one rank is found by `prepare`, without help of the others; `work` is refused by all or none.
    """
    if options.class_parallel is None and options.checkpoint is None and not launched():
        return work(prepare(None), None)
    with distributed.run() as comm, contextlib.ExitStack() as stack:
        if comm.rank:
            silence = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(silence))
            stack.enter_context(contextlib.redirect_stderr(silence))
        prepared, refusal = None, None
        try:
            grid = distributed.Grid.of(comm, options.class_parallel or 1)
            prepared = prepare(comm)
        except (_Refused, ValueError, swl.BackendUnavailable) as error:
            refusal = str(error)
        refusals = comm.allgather(refusal)
        found = next((text for text in refusals if text is not None), None)
        if found is not None:
            print(f"swl: {found}", file=sys.stderr)
            return 2
        with swl.use_backend(options.backend or active()):
            distributed.own_device(comm)
        try:
            return work(prepared, grid)
        except _Refused as error:  # by all ranks
            print(f"swl: {error}", file=sys.stderr)
            return 2


def _prepare(options: argparse.Namespace) -> tuple[datasets.Data, Settings, Any]:
    """Check what can be checked, and load the data."""
    _check_outputs(options.plot, options.save)
    try:
        tqdm = datasets.require("tqdm", "the progress bar of swl train").tqdm
        if options.plot is not None:
            datasets.require("matplotlib", "--plot")
        data = datasets.digits() if options.data is None else datasets.from_file(options.data)
    except datasets.DataError as error:
        raise _Refused(str(error)) from None
    settings = Settings(
        options.hidden, options.epochs, options.batch_size, options.lr, options.seed, options.dtype, options.scale
    )
    try:
        get(options.backend or active())
    except ValueError as error:  # no backend of that name
        raise _Refused(str(error)) from None
    return data, settings, tqdm


def _check_outputs(picture: Path | None, parameters: Path | None = None) -> None:
    """Refuse before the work what could not be written after it."""
    for path in (picture, parameters):
        if path is not None and path.is_dir():
            raise _Refused(f"cannot write {path}: it is a folder")
        if path is not None and not os.access(path.parent, os.W_OK):
            raise _Refused(f"cannot write {path}: {path.parent} is not a folder that can be written to")
    if picture is not None and picture.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise _Refused(f"--plot FILE must end in .png, .svg or .pdf, got {picture}")
    if parameters is not None and parameters.suffix != ".npz":
        raise _Refused(f"--save FILE must end in .npz, got {parameters}")


def _run_training(
    prepared: tuple[datasets.Data, Settings, Any], options: argparse.Namespace, grid: distributed.Grid | None
) -> int:
    data, settings, tqdm = prepared
    (N, D), leads = data.x.shape, grid is None or grid.world.rank == 0
    checkpoints = None
    if grid is not None and options.checkpoint is not None:
        checkpoints = distributed.Checkpoints(options.checkpoint, grid)
    with contextlib.ExitStack() as stack:
        stack.enter_context(swl.use_backend(options.backend or active()))
        name = active()
        print(f"backend {name}, {settings.dtype}; {data.name}: {N} rows of {D} numbers, {data.n_classes} classes")
        _print_ranks(grid)
        bar = stack.enter_context(tqdm(unit="step", file=sys.stderr, leave=False, disable=not leads))

        def on_start(net: swl.Sequential, report: GradientReport, steps: int) -> None:
            bar.reset(total=steps)
            tqdm.write(f"{net!r}")
            tqdm.write(f"gradients checked: worst relative error {report.worst:.1e}, tolerance {report.tol:.0e}")

        def on_epoch(number: int, epoch: training.Epoch) -> None:
            tqdm.write(f"epoch {number:3}  loss {epoch.loss:.8f}  validation accuracy {epoch.validation:.4f}")

        try:
            result = training.train(
                data,
                settings,
                on_start=on_start,
                on_step=lambda loss: bar.update(),
                on_epoch=on_epoch,
                grid=grid,
                checkpoints=checkpoints,
            )
        except datasets.DataError as error:  # a checkpoint of another run
            raise _Refused(str(error)) from None
    print(f"throughput {result.rows_per_second:,.0f} rows/s")
    if options.plot is not None and leads:
        training.plot(options.plot, result, f"{data.name}, backend {name}")
        print(f"picture in {options.plot}")
    if options.save is not None and leads:
        training.save(options.save, result.net)
        print(f"parameters in {options.save}")
    print(f"test accuracy {result.test_accuracy:.4f}")
    return 0


def _print_ranks(grid: distributed.Grid | None) -> None:
    if grid is not None:
        print(f"{grid.world.size} ranks: rows over {grid.data.size}, classes over {grid.classes.size}")


# ------------------------------------------------------------------------------------------------ swl plan


def _plan(options: argparse.Namespace) -> int:
    with distributed.run() as comm:
        ranks = options.ranks or comm.size
        step = cost.Step(
            options.rows,
            options.inputs,
            options.classes,
            ranks,
            options.class_parallel or ranks,
            options.memory_budget,
        )
        given = {name: getattr(options, name) for name in cost.Machine._fields}
        refusal = None
        if step.ranks % step.class_parallel:
            refusal = f"--class-parallel must divide --ranks, {step.ranks}, got {step.class_parallel}"
        elif options.measure and (step.ranks, step.class_parallel) != (comm.size, comm.size):
            refusal = f"--measure needs all classes spread over the {comm.size} ranks there are, got {step.ranks} ranks"
        elif any(value == 0 for name, value in given.items() if name != "latency"):
            refusal = "--flops, --logits and --bandwidth must be above 0"
        if refusal is not None:
            if comm.rank == 0:
                print(f"swl: {refusal}", file=sys.stderr)
            return 2
        measured = cost.measure(comm, step) if options.measure else None  # first: what it needs is not yet there
        missing = [name for name, value in given.items() if value is None]
        machine = cost.calibrate(comm) if missing else cost.Machine(**given)
        machine = machine._replace(**{name: value for name, value in given.items() if value is not None})
        if comm.rank:
            return 0
        print(f"ClassParallelHead: {step.N:,} rows, {step.D:,} inputs, {step.C:,} classes")
        print(f"  {step.ranks} ranks: rows over {step.groups}, classes over {step.class_parallel}")
        for name, value in step.table(machine):
            print(f"  {name:<16}{value}")
        print(
            f"  {'a rank does':<16}{machine.flops:.3g} flop/s, {machine.logits:.3g} logits/s, "
            f"{machine.bandwidth:.3g} B/s, {machine.latency:.2g} s per collective"
            + (f"; measured on {comm.size} ranks here: {', '.join(missing)}" if missing else "")
        )
        if measured is not None:
            print(f"  {'measured time':<16}{measured.seconds * 1e3:,.3g} ms")
            if measured.memory:
                ratio = measured.memory / step.memory
                print(f"  {'measured memory':<16}{measured.memory / 2**20:,.1f} MiB, {ratio:.2f} of the plan")
    return 0


# ------------------------------------------------------------------------------------------------ swl train text


def _text_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="swl train text",
        description="Train a next-word model on Python's own documentation: once with the fused head and once with the "
        "unfused one, each in a process of its own, so that their peak memory can be compared. On the ranks of mpiexec: "
        "with the fused head, spread over them.",
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--head", choices=["both", "fused", "unfused"], help="which to train with; over ranks fused, else both"
    )
    parser.add_argument("--unfused", action="store_const", const="unfused", dest="head", help="as --head unfused")
    parser.add_argument("--backend", metavar="NAME", help="one of those that `swl info` lists")
    defaults = text.Settings()._asdict()
    for name, kind, least, meaning in (
        ("hidden", int, 1, "units of the hidden layer"),
        ("epochs", int, 1, "passes over the training words"),
        ("batch_size", int, 1, "words per step"),
        ("lr", float, 0, "learning rate at the start"),
        ("seed", int, 0, "of initial weights and order of words"),
        ("embedding", int, 1, "numbers by which a word is represented"),
        ("context", int, 2, "words from which the next one is predicted"),
        ("memory_budget", int, 1, "bytes of working memory of the fused head"),
    ):
        flag, check = f"--{name.replace('_', '-')}", _at_least(kind, least)
        parser.add_argument(flag, type=check, default=defaults[name], metavar="N", help=meaning)
    parser.add_argument("--dtype", choices=["float64", "float32"], default=defaults["dtype"], help="of the parameters")
    parser.add_argument("--limit", type=_at_least(int, 1), metavar="N", help="use only about the first N words")
    _add_ranks(parser)
    parser.set_defaults(run=_train_text)
    return parser


def _train_text(options: argparse.Namespace) -> int:
    return _alone_or_on_ranks(
        options, lambda comm: _check_text(options, comm), lambda _, grid: _run_text(options, grid)
    )


def _check_text(options: argparse.Namespace, comm: Any) -> None:
    if comm is not None and options.head not in (None, "fused"):
        raise _Refused(f"--head {options.head}: over ranks there is only the fused head, of which each has a part")
    try:
        get(options.backend or active())
        datasets.require("tqdm", "the progress bar of swl train")
    except ValueError as error:  # no backend of that name, or no tqdm
        raise _Refused(str(error)) from None


def _run_text(options: argparse.Namespace, grid: distributed.Grid | None) -> int:
    settings = text.Settings(*(getattr(options, name) for name in text.Settings._fields))
    backend = options.backend or active()
    chosen = options.head or ("both" if grid is None else "fused")
    heads = ("fused", "unfused") if chosen == "both" else (chosen,)
    results = {}

    def read() -> text.Corpus:
        return text.corpus(text.documents(), options.limit)

    try:
        words = read() if grid is None else from_rank_0(grid.world, read)  # one text, whatever the ranks' Pythons have
        sizes = f"{len(words.train):,} words to train on, {len(words.held_out):,} held out"
        print(f"backend {backend}, {settings.dtype}; text: {sizes}, {len(words.vocabulary):,} distinct", flush=True)
        _print_ranks(grid)
        for head in heads:
            if grid is None:
                found = text.train_apart(words, settings, head, backend)
                for number, loss in enumerate(found.history, 1):
                    _print_epoch(number, loss)
            else:
                found = _train_on_ranks(words, settings, options.checkpoint, backend, grid)
            results[head] = found
            print(
                f"{head:<8}perplexity {found.perplexity:.2f}  {found.tokens_per_second:,.0f} tokens/s  "
                f"peak memory {_mib(found.peak)}, {_mib(found.before)} of it before the first step",
                flush=True,
            )
    except datasets.DataError as error:  # no text, a process that failed, or a checkpoint of another run
        raise _Refused(str(error)) from None
    if len(results) == 2:
        logits = settings.batch_size * len(words.vocabulary) * np.dtype(settings.dtype).itemsize
        peaks = " and ".join(f"{_mib(found.peak)} {head}" for head, found in results.items())
        print(f"peak memory {peaks}; the logits of a batch are {_mib(logits)}")
    unigram = text.unigram_perplexity(words, settings.context)
    print(f"test perplexity {results[heads[0]].perplexity:.1f}, of the unigram baseline {unigram:.1f}")
    return 0


def _train_on_ranks(
    words: text.Corpus, settings: text.Settings, folder: Path | None, backend: str, grid: distributed.Grid
) -> text.Result:
    """Train the fused head; the memory is that of the rank that had most."""
    leads = grid.world.rank == 0
    with swl.use_backend(backend), training.progress(text.steps(words.train, settings), "fused", leads) as on_step:
        found = text.train(
            words.train,
            words.held_out,
            len(words.vocabulary),
            settings,
            on_step=on_step,
            on_epoch=_print_epoch,
            grid=grid,
            checkpoints=None if folder is None else distributed.Checkpoints(folder, grid),
        )
    peak, before = gather_numbers(grid.world, found.peak, found.before).max(axis=0)
    return found._replace(peak=int(peak), before=int(before))


def _print_epoch(number: int, loss: float) -> None:
    datasets.require("tqdm", "the progress bar of swl train").tqdm.write(f"epoch {number:3}  loss {loss:.8f}")


def _mib(n_bytes: int) -> str:
    return f"{n_bytes / 2**20:.0f} MiB"


# ------------------------------------------------------------------------------------------------ swl bench


def _bench(options: argparse.Namespace) -> int:
    from swl import bench

    if options.plot is not None:
        _check_outputs(options.plot)
        try:
            datasets.require("matplotlib", "--plot")
        except datasets.DataError as error:
            raise _Refused(str(error)) from None
        bench.plot(options.plot, options.rounds)
        print(f"picture in {options.plot}")
        return 0
    groups = bench.GROUPS if options.groups == ["all"] else options.groups or ("losses", "forward")
    unknown = sorted(set(groups) - set(bench.GROUPS))
    if unknown:
        raise _Refused(f"GROUP may be {', '.join(bench.GROUPS)} or all, got {unknown[0]!r}")
    results = []
    for case in bench.CASES.values():
        if case.group in groups:
            results.append((case, bench.measure(case, options.rounds)))
            print(f"{case.group}: {case.title}", file=sys.stderr)
    print("Milliseconds, and in brackets as a multiple of swl's own.\n")
    print(bench.table(results))
    return 0


# ------------------------------------------------------------------------------------------------ swl warmup


def _warmup(options: argparse.Namespace) -> int:
    dtypes, backend = options.dtype or ["float32"], options.backend or active()
    try:
        get(backend)
        swl.warmup(dtypes, backend=backend)
    except (ValueError, TypeError) as error:  # no backend of that name, or bfloat16 without its package
        raise _Refused(str(error)) from None
    print(f"compiled for {', '.join(dtypes)} on {backend}; kernels are kept in {_kernel_cache()}")
    return 0


# ------------------------------------------------------------------------------------------------ swl info


def _info(options: argparse.Namespace) -> int:
    for title, lines in (("versions", _versions()), ("backends", _backends()), ("BLAS", _blas()), ("Numba", _numba())):
        print(title)
        for name, value in lines:
            print(f"  {name:<16}{value}")
    return 0


def _versions() -> Iterator[tuple[str, str]]:
    yield "swl", f"{swl.__version__}, {Path(swl.__file__).parent}"
    yield "python", f"{platform.python_version()}, {platform.platform()}"
    for name in ("numpy", "numba", "cupy", "torch", "mpi4py", "scikit-learn", "matplotlib", "tqdm"):
        yield name, _version(name)


def _version(package: str) -> str:
    names = ("cupy-cuda13x", "cupy-cuda12x", "cupy") if package == "cupy" else (package,)
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            return metadata.version(name) + (f" ({name})" if name != package else "")
    return "not installed"


def _backends() -> Iterator[tuple[str, str]]:
    try:
        chosen = active()
    except ValueError as error:
        yield "SWL_BACKEND", str(error)
        chosen = ""
    for info in swl.available_backends():
        if info.usable:
            details = ", ".join(f"{key} {value}" for key, value in get(info.name).info().items())
            yield info.name, f"usable{' (active)' if info.name == chosen else ''}: {details}"
        else:
            yield info.name, f"not usable: {info.reason}"


def _blas() -> Iterator[tuple[str, str]]:
    built: Any = np.show_config(mode="dicts")
    blas = built.get("Build Dependencies", {}).get("blas", {})
    yield "numpy's", f"{blas.get('name', 'unknown')} {blas.get('version', '')}".strip()
    try:
        pools = importlib.import_module("threadpoolctl").threadpool_info()
    except ModuleNotFoundError:
        yield "threads", "unknown (pip install threadpoolctl)"
        return
    for pool in pools:
        if pool["user_api"] == "blas":
            yield "threads", f"{pool['num_threads']} ({pool['internal_api']} {pool['version']})"


def _numba() -> Iterator[tuple[str, str]]:
    import numba

    config: Any = numba.config
    yield "threading layer", f"{config.THREADING_LAYER}; not used: swl's kernels run on a pool of its own"
    yield "kernel cache", _kernel_cache()
    use = swl.memory_use()
    most = f"of at most {_mib(MEMORY.limit)}; swl.empty_cache() gives it back"
    yield "memory", f"{_mib(use.in_use)} in results, {_mib(use.kept)} kept for later ones {most}"


def _kernel_cache() -> str:
    """Name the folder that compiled kernels of the CPU are kept in."""
    from swl.backends.numba import kernels as _cpu_kernels

    return _cpu_kernels.sweep.stats.cache_path or "none that is safe and can be written to: each process compiles"
