"""What a schedule would give before machines are rented: the product's own rules over an event model. `python -m vtriune.plan`."""

from vtriune.plan.model import simulate
from vtriune.plan.schedule import Schedule, ScheduleResult

__all__ = ["Schedule", "ScheduleResult", "simulate"]
