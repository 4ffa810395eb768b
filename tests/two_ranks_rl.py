"""A run of rl_demo.py that a signal stops after two steps, and that is then resumed: by one process in test_rl_demo.py,
by two in two_ranks.py."""
import contextlib
from dataclasses import replace

from conftest import ROOT  # noqa: F401  (puts the scripts on the path)
import rl_demo
from train import stop_signals


class SignalInSecondStep:
    """In the place of train.StopSignal: a SIGTERM that arrives during the second step."""
    times_read = 0

    @property
    def number(self):
        self.times_read += 1
        return 15 if self.times_read > 1 else 0


@contextlib.contextmanager
def stop_after_two_steps():
    yield SignalInSecondStep()


def stop_and_resume(cfg):
    rl_demo.stop_signals = stop_after_two_steps
    stopped = rl_demo.main(cfg)
    rl_demo.stop_signals = stop_signals
    assert (stopped, rl_demo.main(replace(cfg, resume=True))) == (128 + 15, 0)
