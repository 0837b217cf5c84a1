"""Objectives: Pyro losses that are short formulas over the terms of one replay."""

from lvppl.objectives.base import Objective, Quantity, Report
from lvppl.objectives.distortions import absolute_error, hamming, squared_error
from lvppl.objectives.elbo import ELBO
from lvppl.objectives.hard_elbo import HardELBO, HardReport
from lvppl.objectives.iwae import IWAE, IWAEReport
from lvppl.objectives.rate_distortion import RateDistortion, RateDistortionReport
from lvppl.objectives.reweighted_wake_sleep import ReweightedWakeSleep
from lvppl.objectives.schedules import CyclicSchedule, LinearSchedule, Schedule

__all__ = [
    "ELBO",
    "IWAE",
    "CyclicSchedule",
    "HardELBO",
    "HardReport",
    "IWAEReport",
    "LinearSchedule",
    "Objective",
    "Quantity",
    "RateDistortion",
    "RateDistortionReport",
    "Report",
    "ReweightedWakeSleep",
    "Schedule",
    "absolute_error",
    "hamming",
    "squared_error",
]
