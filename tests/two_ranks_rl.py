"""A run of rl_demo.py that is told to stop after two steps and resumed: by one process in test_rl_demo.py, by two in
two_ranks.py."""
import contextlib
from dataclasses import replace

from conftest import ROOT  # noqa: F401  (puts the scripts on the path)
import rl_demo
from train import stop_signals


class AfterTwoSteps:
    """A signal that comes during the second step."""
    asked = 0

    @property
    def number(self):
        self.asked += 1
        return 15 * (self.asked > 1)

    @number.setter
    def number(self, value):
        pass


@contextlib.contextmanager
def stop_after_two_steps():
    yield AfterTwoSteps()


def stop_and_resume(cfg):
    rl_demo.stop_signals = stop_after_two_steps
    stopped = rl_demo.main(cfg)
    rl_demo.stop_signals = stop_signals
    assert (stopped, rl_demo.main(replace(cfg, resume=True))) == (128 + 15, 0)
