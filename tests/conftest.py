"""What the tests share: the scripts on the path, one tiny reward model with random weights, a second process for half
of them, and commands that run beside them."""
import json
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from itertools import chain
from pathlib import Path

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"  # no test asks the network
ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import train  # noqa: E402
from model import RewardModel, tiny_backbone  # noqa: E402

# what the tiny tokenizer is trained on: fixed, so that token ids can be pinned
TEXTS = ["What colour is the circle? red green blue", "How many shapes are there? 1 2 3 4",
         "Where is it? left right top bottom"] * 20


def pytest_configure(config):
    """Models this small gain nothing from a second thread, and lose much where other programs want the cores. And
    pytest sets aside the filter of train.py's own."""
    torch.set_num_threads(1)
    config.addinivalue_line("filterwarnings", "ignore:torch.distributed is disabled")


# Half as deep as the tiny backbone: as much to test, in less time
small_backbone = partial(tiny_backbone, texts=TEXTS, width=64, layers=2)
train.tiny_backbone = partial(tiny_backbone, layers=2)  # --backbone tiny of the runs in this process


@pytest.fixture(scope="session")
def backbones(tmp_path_factory):
    """Folders of tiny checkpoints by model type, each made when it is first needed."""
    root = tmp_path_factory.mktemp("backbones")

    def folder(model_type="qwen2_5_vl"):
        if not (root / model_type).exists():
            small_backbone(root / model_type, model_type=model_type)
        return root / model_type

    return folder


@pytest.fixture(scope="session")
def tiny(backbones):
    """A tiny Qwen2.5-VL reward model; tests that change it work on a copy."""
    torch.manual_seed(0)
    return RewardModel.from_backbone(backbones()).eval()


COMMANDS = {}  # {name of a fixture: function(folder, backbones) that makes what its command needs, returns its words}
STARTED = {}  # {name: future of (folder, process), or the error of making what the command needs}
QUIET = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}  # environment of commands


def command(make):
    """Turns such a function into a fixture: the folder, and the process when it has ended.

    All commands that the chosen tests need are started before the first test, two at a time, and run beside the tests.
    """
    COMMANDS[make.__name__] = make

    @pytest.fixture(scope="session", name=make.__name__)
    def ended(started):
        if isinstance(started[make.__name__], Exception):
            raise started[make.__name__]
        return started[make.__name__].result()

    return ended


def needs_command(item):
    return not COMMANDS.keys().isdisjoint(item.fixturenames)


def pytest_collection_modifyitems(items):
    """Those that need a command come last: until then the others are run beside it."""
    items.sort(key=needs_command)


def run_script(folder, words):
    """`python WORDS`, on Linux as a fork, which has torch loaded already; its output goes into files of the folder."""
    if sys.platform != "linux":
        return folder, subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, env=os.environ | QUIET,
                                      capture_output=True, text=True, timeout=900)
    process = multiprocessing.get_context("fork").Process(target=as_script, args=(folder, words))
    process.start()
    process.join(900)
    stdout, stderr = ((folder / name).read_text() for name in ("stdout", "stderr"))
    if process.exitcode is None:
        os.killpg(process.pid, signal.SIGKILL)  # and the processes that it started
        raise TimeoutError(f"{words[0]} takes more than 15 minutes; its errors: {stderr[-2000:]}")
    return folder, subprocess.CompletedProcess(words, process.exitcode, stdout, stderr)


def as_script(folder, words):
    os.setsid()
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))
    os.environ |= QUIET
    sys.argv = [str(word) for word in words]
    os.chdir(ROOT)
    runpy.run_path(sys.argv[0], run_name="__main__")


@pytest.fixture(scope="session", autouse=True)
def started(request, tmp_path_factory, backbones):
    """{name: future of (folder, process)}, or the error of making what the command needs."""
    needed = dict.fromkeys(name for item in request.session.items for name in item.fixturenames)
    STARTED.update((name, None) for name in needed if name in COMMANDS)
    if not STARTED:
        yield STARTED
        return
    linux = sys.platform == "linux"
    with ProcessPoolExecutor(2, multiprocessing.get_context("fork")) if linux else ThreadPoolExecutor(2) as pool:
        pool.submit(os.getpid).result()  # forks now, while there are no threads
        for name in STARTED:
            folder = tmp_path_factory.mktemp(name)
            try:
                STARTED[name] = pool.submit(run_script, folder, COMMANDS[name](folder, backbones))
            except Exception as error:  # of the tests that need it, not of all
                STARTED[name] = error
        yield STARTED
        pool.shutdown(cancel_futures=True)  # where the tests were stopped


# ----------------------------------------------------------------------------------------------- two processes

LONGEST = ["test_train.py", "test_rl_demo.py", "test_families.py", "test_paradigms.py"]  # started first
ENDED = set()  # the tests that were reported to their end


def pytest_runtest_logreport(report):
    if report.when == "teardown":
        ENDED.add(report.nodeid)


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session):
    """Two cores, two processes: a fork, for torch and transformers are loaded by then, and load for seconds.

    Each takes the next test module from a pipe until there is none: whole modules, whose fixtures are then made once.
    Commands are started by the first process alone, which runs the tests that need them. The fork writes its reports
    into a file, and the first process reports them as its own (but not its warnings); a test whose end was never
    reported, since the fork died, is an error. There is no fork for a single module, or where output is not captured
    or a debugger is used."""
    option, hook, modules, waiting = session.config.option, session.config.hook, {}, []
    for item in session.items:
        (waiting if needs_command(item) else modules.setdefault(item.path, [])).append(item)
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else 1
    is_interactive = option.capture == "no" or any(
        getattr(option, name, False) for name in ("collectonly", "usepdb", "trace", "setupshow"))
    if cores < 2 or len(modules) < 2 or session.testsfailed or is_interactive:
        return None  # pytest's own loop
    order = sorted(modules, key=lambda path: LONGEST.index(path.name) if path.name in LONGEST else len(LONGEST))
    queue, end = os.pipe()
    os.write(end, bytes(range(len(order))))
    os.close(end)
    taken = (modules[order[byte[0]]] for byte in iter(lambda: os.read(queue, 1), b""))
    session.config._tmp_path_factory.getbasetemp()  # one for both; folders in it are made atomically
    sys.stdout.flush()
    with tempfile.NamedTemporaryFile() as reports:
        fork, rest = os.fork(), b""
        if not fork:
            run_fork(session, chain.from_iterable(taken), reports.name)

        def report_lines():
            nonlocal rest
            *lines, rest = (rest + reports.read()).split(b"\n")  # of the last line the end may be missing still
            for line in lines:
                report = hook.pytest_report_from_serializable(config=session.config, data=json.loads(line))
                if isinstance(report.longrepr, list):  # of a skipped test, before it was JSON
                    report.longrepr = tuple(report.longrepr)
                hook.pytest_runtest_logreport(report=report)

        try:
            run(session, with_waiting(taken, waiting), report_lines)
            while (ended := os.waitpid(fork, os.WNOHANG)) == (0, 0):
                time.sleep(0.05)
                report_lines()
        except BaseException:  # the tests were stopped
            os.kill(fork, signal.SIGKILL)
            raise
        report_lines()
    check_stop(session)
    status = os.waitstatus_to_exitcode(ended[1])
    lost = [item for item in session.items if item.nodeid not in ENDED] or session.items[-1:] * bool(status)
    for item in lost:
        why = f"the second process ended with status {status}, and not after its last test"
        report = pytest.TestReport(item.nodeid, item.location, {}, "failed", why, "setup")
        hook.pytest_runtest_logreport(report=report)
    return True


def with_waiting(taken, waiting):
    """Those that need commands follow the first module by whose last test the commands have ended."""
    for items in taken:
        yield from items
        if STARTED and all(isinstance(one, Exception) or one is not None and one.done() for one in STARTED.values()):
            yield from waiting
            waiting = []
    yield from waiting


def run(session, items, after_each=lambda: None):
    """As pytest's own loop. pytest keeps the fixtures that a test shares with the next one."""
    item = next(items, None)
    while item is not None:
        following = next(items, None)
        session.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        after_each()
        check_stop(session)
        item = following


def check_stop(session):
    if session.shouldfail:  # -x
        raise session.Failed(session.shouldfail)
    if session.shouldstop:
        raise session.Interrupted(session.shouldstop)


def run_fork(session, items, file):
    """The tests of the second process, which writes a line for each report, and ends here."""
    config, plugins, status = session.config, session.config.pluginmanager, 1

    class Writer:
        def pytest_runtest_logreport(self, report):
            data = config.hook.pytest_report_to_serializable(config=config, report=report)
            os.write(reports, json.dumps(data, default=str).encode() + b"\n")

    try:
        reports = os.open(file, os.O_WRONLY | os.O_APPEND)
        plugins.unregister(name="terminalreporter")
        plugins.register(Writer())
        capture = plugins.getplugin("capturemanager")  # with files of its own
        capture.stop_global_capturing()
        capture.start_global_capturing()
        capture.suspend_global_capture()
        session.items = [item for item in session.items if not needs_command(item)]  # and so no command is started here
        try:
            run(session, items)
        finally:
            session._setupstate.teardown_exact(None)
        status = 0
    except (session.Failed, session.Interrupted):
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


# ----------------------------------------------------------------------------------------------- commands

TWO_RANKS = {}  # {name of a script: function(folder, backbones) that makes what two_ranks.py needs, gives its settings}


@command
def two_ranks(folder, backbones):
    """All that needs two processes: folder/SCRIPT has what it leaves of each script. What the tests compare with it is
    computed by one process."""
    for script, make in TWO_RANKS.items():
        (folder / script).mkdir()
        (folder / script / "settings.json").write_text(json.dumps(make(folder / script, backbones)))
    return ["tests/two_ranks.py", folder]
