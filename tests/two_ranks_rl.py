"""What test_rl_demo.py runs under torchrun: a run that is told to stop after two steps and resumed. Arguments: those of
rl_demo.py."""
import contextlib
import sys
from dataclasses import replace

from conftest import ROOT  # noqa: F401  (puts the scripts on the path)
import rl_demo
from train import end_processes, stop_signals
from transformers import HfArgumentParser


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


if __name__ == "__main__":
    (cfg,) = HfArgumentParser(rl_demo.Config).parse_args_into_dataclasses()
    rl_demo.stop_signals = stop_after_two_steps
    stopped = rl_demo.main(cfg.resolved())
    rl_demo.stop_signals = stop_signals
    status = rl_demo.main(replace(cfg, resume=True).resolved())
    end_processes()
    sys.exit(0 if (stopped, status) == (128 + 15, 0) else 1)
