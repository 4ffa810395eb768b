"""What test_rl_demo.py runs under torchrun: a run that is told to stop after two steps and resumed. Arguments: those of rl_demo.py."""
import sys
from dataclasses import replace

from conftest import ROOT  # noqa: F401  (puts the scripts on the path)
import rl_demo
from data import StopSignal, setup
from transformers import HfArgumentParser


class AfterTwoSteps(StopSignal):
    """A signal that comes between the second step and the third."""
    asked = -1

    @property
    def number(self):
        self.asked += 1
        return 15 * (self.asked >= 2)

    @number.setter
    def number(self, value):
        pass


if __name__ == "__main__":
    (cfg,) = HfArgumentParser(rl_demo.Config).parse_args_into_dataclasses()
    world = setup()
    rl_demo.StopSignal = AfterTwoSteps
    stopped = rl_demo.main(cfg.resolved(), world)
    rl_demo.StopSignal = StopSignal
    status = rl_demo.main(replace(cfg, resume=True).resolved(), world)
    world.close()
    sys.exit(0 if (stopped, status) == (128 + 15, 0) else 1)
