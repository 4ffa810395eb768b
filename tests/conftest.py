"""What the tests share: the scripts on the path, one tiny reward model with random weights, a second process for half
of them, and commands that run beside them."""
import json
import multiprocessing
import os
import pickle
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"  # no test asks the network
ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import rl_demo  # noqa: E402
import train  # noqa: E402
from model import RewardModel, tiny_backbone  # noqa: E402

# what the tiny tokenizer is trained on: fixed, so that token ids can be pinned
TEXTS = ["What colour is the circle? red green blue", "How many shapes are there? 1 2 3 4",
         "Where is it? left right top bottom"] * 20


def pytest_configure():
    """Models this small gain nothing from a second thread, and lose much where other programs want the cores."""
    torch.set_num_threads(1)


def draw_nothing(file, title, panels):
    """In the place of train.draw_curves: matplotlib draws for longer than a short run takes. It could be drawn."""
    for _, curves, dashed, _ in panels:
        assert all(len([*map(float, point)]) == 2 for points in curves.values() for point in points)
        assert all(isinstance(float(y), float) for y in dashed.values())
    train.write_text(file, "<svg/>")
    return "<svg/>"


@contextmanager
def real_curves(draw=train.draw_curves):
    """For tests that look at pictures."""
    with pytest.MonkeyPatch.context() as patch:
        for script in (train, rl_demo):
            patch.setattr(script, "draw_curves", draw)
        yield


@pytest.fixture(scope="session", autouse=True)
def no_curves():
    with real_curves(draw_nothing):
        yield


@pytest.fixture(scope="session")
def backbones(tmp_path_factory):
    """Folders of tiny checkpoints by kind, made when first asked for."""
    root, made = tmp_path_factory.mktemp("backbones"), {}

    def folder(kind="qwen2_5_vl"):
        if kind not in made:
            made[kind] = tiny_backbone(root / kind, TEXTS, kind=kind, width=64)
        return made[kind]

    return folder


@pytest.fixture(scope="session")
def tiny(backbones):
    """A tiny Qwen2.5-VL reward model; tests that change it work on a copy."""
    torch.manual_seed(0)
    return RewardModel.from_backbone(backbones()).eval()


COMMANDS = {}  # {name of a fixture: function(folder, backbones) that makes what its command needs and gives its words}
BEGUN = {}  # {name: future of (folder, process), or the error of making what the command needs}
FORK = multiprocessing.get_context("fork")


def command(make):
    """Turns such a function into a fixture: the folder, and the process when it has ended.

    A test takes one core, so all commands that the chosen tests ask for begin before the first test, two at a time.
    What is made for them is made before, too: the random numbers of torch are shared by all threads."""
    COMMANDS[make.__name__] = make

    @pytest.fixture(scope="session", name=make.__name__)
    def ended(begun):
        if isinstance(begun[make.__name__], Exception):
            raise begun[make.__name__]
        return begun[make.__name__].result()

    return ended


def waits(item):
    return not COMMANDS.keys().isdisjoint(item.fixturenames)


def pytest_collection_modifyitems(items):
    """Those that wait for a command come last: until then the others are run beside it."""
    items.sort(key=waits)


def run_script(folder, words):
    """`python WORDS` as a fork, which has torch loaded already; what it says goes into files of the folder."""
    process = FORK.Process(target=as_script, args=(folder, words))
    process.start()
    process.join(900)
    if process.exitcode is None:
        process.kill()
        raise TimeoutError(f"{words[0]} takes more than 15 minutes")
    said = [(folder / name).read_text() for name in ("stdout", "stderr")]
    return folder, subprocess.CompletedProcess(words, process.exitcode, *said)


def as_script(folder, words):
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))
    os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    sys.argv = [str(word) for word in words]
    os.chdir(ROOT)
    runpy.run_path(sys.argv[0], run_name="__main__")


@pytest.fixture(scope="session", autouse=True)
def begun(request, tmp_path_factory, backbones):
    """{name: future of (folder, process)}, or the error of making what the command needs."""
    asked = dict.fromkeys(name for item in request.session.items for name in item.fixturenames)
    BEGUN.update((name, None) for name in asked if name in COMMANDS)
    if not BEGUN:
        yield BEGUN
        return
    with ProcessPoolExecutor(2, FORK) as pool:
        pool.submit(os.getpid).result()  # forks now, while there are no threads
        for name in BEGUN:
            folder = tmp_path_factory.mktemp(name)
            try:
                BEGUN[name] = pool.submit(run_script, folder, COMMANDS[name](folder, backbones))
            except Exception as error:  # of the tests that ask for it, not of all
                BEGUN[name] = error
        yield BEGUN
        pool.shutdown(cancel_futures=True)  # where the tests were stopped


# ----------------------------------------------------------------------------------------------- two processes

LONGEST = ["test_train.py", "test_families.py", "test_rl_demo.py", "test_paradigms.py"]  # begun first, then the others
ENDED = set()  # the tests that were reported to their end


def pytest_runtest_logfinish(nodeid):
    ENDED.add(nodeid)


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session):
    """Two cores, two processes: a fork, for torch and transformers are loaded by then, and load for seconds.

    Each takes the next test module from a pipe until there is none: whole modules, whose fixtures are then made once.
    Commands are begun by the first process alone, which runs what waits for them. The fork writes down each call of a
    hook that reports, and the first process makes it as if it were its own. Whatever was not reported to its end, since
    the fork died, is an error. Nothing is forked where a person looks inside, or chose a single module."""
    modules, waiting, option = {}, [item for item in session.items if waits(item)], session.config.option
    for item in session.items:
        if not waits(item):
            modules.setdefault(item.path, []).append(item)
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else 1
    if cores < 2 or len(modules) < 2 or session.testsfailed or option.capture == "no" or any(
            (option.collectonly, option.usepdb, option.trace, option.setupshow)):
        return None  # pytest's own loop
    order = sorted(modules, key=lambda path: LONGEST.index(path.name) if path.name in LONGEST else len(LONGEST))
    queue, end = os.pipe()
    os.write(end, bytes(range(len(order))))
    os.close(end)
    taken = (modules[order[byte[0]]] for byte in iter(lambda: os.read(queue, 1), b""))
    session.config._tmp_path_factory.getbasetemp()  # one for both; folders in it are made atomically
    sys.stdout.flush()
    with tempfile.NamedTemporaryFile() as said:
        if (fork := os.fork()) == 0:
            run_fork(session, chain.from_iterable(taken), said)
        try:
            run(session, with_waiting(taken, waiting), lambda: pass_on(session, said))
            while os.waitid(os.P_PID, fork, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
                time.sleep(0.05)
                pass_on(session, said)
        finally:  # also where the tests were stopped: the fork ends its test, and no other
            os.kill(fork, signal.SIGUSR1)
            status = os.waitstatus_to_exitcode(os.waitpid(fork, 0)[1])
        pass_on(session, said)
    for item in session.items:
        if item.nodeid not in ENDED:
            why = f"the second process ended before this test did, with status {status}"
            report = pytest.TestReport(item.nodeid, item.location, {}, "failed", why, "setup")
            session.config.hook.pytest_runtest_logreport(report=report)
    return True


def with_waiting(taken, waiting):
    """Those that wait for commands follow the first module by whose end the commands have ended."""
    for items in taken:
        yield from items
        if waiting and all(isinstance(command, Exception) or command.done() for command in BEGUN.values()):
            yield from waiting
            waiting = []
    yield from waiting


def run(session, items, after_each=lambda: None):
    """As pytest's own loop. A test is told which comes next, so that what both share is kept."""
    item = next(items, None)
    while item is not None:
        following = next(items, None)
        session.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        after_each()
        stop(session)
        item = following


def stop(session):
    if session.shouldfail:  # -x
        raise session.Failed(session.shouldfail)
    if session.shouldstop:
        raise session.Interrupted(session.shouldstop)


def run_fork(session, items, said):
    """Writes the name of a hook and its arguments for each report, and never returns."""
    config, plugins = session.config, session.config.pluginmanager
    file = open(said.name, "wb", buffering=0)

    def tell(hook, **told):
        file.write(pickle.dumps((hook, told)))

    class Teller:
        def pytest_runtest_logstart(self, nodeid, location):
            tell("pytest_runtest_logstart", nodeid=nodeid, location=location)

        def pytest_runtest_logreport(self, report):
            data = config.hook.pytest_report_to_serializable(config=config, report=report)
            tell("pytest_runtest_logreport", data=data)

        def pytest_runtest_logfinish(self, nodeid, location):
            tell("pytest_runtest_logfinish", nodeid=nodeid, location=location)

        def pytest_warning_recorded(self, warning_message, when, nodeid, location):
            of = warning_message
            of = warnings.WarningMessage(str(of.message), of.category, of.filename, of.lineno)
            if when == "runtest":  # and not those of before the fork, which are told again to whoever joins
                tell("pytest_warning_recorded", warning_message=of, when=when, nodeid=nodeid, location=location)

    status = 1
    try:
        signal.signal(signal.SIGUSR1, lambda *_: setattr(session, "shouldstop", "the first process stopped"))
        plugins.unregister(name="terminalreporter")
        plugins.register(Teller())
        capture = plugins.getplugin("capturemanager")  # with files of its own
        capture.stop_global_capturing()
        capture.start_global_capturing()
        capture.suspend_global_capture()
        session.items = [item for item in session.items if not waits(item)]  # and so no command is begun here
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


def pass_on(session, said):
    """What the fork wrote since the last time, as calls of hooks in this process."""
    hook = session.config.hook
    while True:
        place = said.tell()
        try:
            name, told = pickle.load(said)
        except (EOFError, pickle.UnpicklingError):  # nothing, or not yet to its end
            said.seek(place)
            return
        if name == "pytest_runtest_logreport":
            told = {"report": hook.pytest_report_from_serializable(config=session.config, **told)}
        call = getattr(hook, name)
        call.call_historic(kwargs=told) if call.is_historic() else call(**told)


# ----------------------------------------------------------------------------------------------- commands

TWO_RANKS = {}  # {name of a script: function(folder, backbones) that makes what two_ranks.py needs, gives its settings}


@command
def two_ranks(folder, backbones):
    """All that needs two processes: folder/SCRIPT is what it leaves of each script. What the tests compare with it is
    done by one process."""
    for script, make in TWO_RANKS.items():
        (folder / script).mkdir()
        (folder / script / "settings.json").write_text(json.dumps(make(folder / script, backbones)))
    return ["tests/two_ranks.py", folder]
