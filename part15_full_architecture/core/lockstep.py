"""Engine cores whose ranks share experts: while one of them has requests, all take steps, together.

A rank that has no tokens must still take part in every exchange of tokens, because its experts may get those of
others. So while one core has requests, a core without any takes dummy steps. The time from when all begin until all
stop is a wave (vLLM's name).
"""

from __future__ import annotations

INTERVAL = 16  # after this many steps, the cores ask whether any of them has requests


class Lockstep:
    """One core's view. All cores ask the same question in the same steps, and get the same answers, so all stop after
    the same step.

    wave: how many waves have ended. num_steps: those of this wave that were launched.
    """

    def __init__(self) -> None:
        self.wave = self.num_steps = 0
        self.is_running = False
        self._stops_after: int | None = None
        self._next_wave_is_due = False

    def start(self) -> None:
        """Begin to take steps. If a request of this core is the reason, the others must be told."""
        self.is_running, self.num_steps, self._stops_after = True, 0, None

    def join(self, wave: int) -> None:
        """Another core has started a wave. Here, the one before may not be over yet."""
        if wave == self.wave and not self.is_running:
            self.start()
        elif wave == self.wave + 1:
            self._next_wave_is_due = True

    def begin_step(self, has_requests: bool) -> bool | None:
        """Call this for every step that is launched. Returns what the step is to ask: whether any core has requests,
        where this one says has_requests; or None, if it asks nothing."""
        self.num_steps += 1
        is_asked = self.num_steps % INTERVAL == 0
        if self.num_steps == self._stops_after:
            self.wave, self.is_running = self.wave + 1, False
            if self._next_wave_is_due:
                self._next_wave_is_due = False
                self.start()
            return None
        return has_requests if is_asked else None

    def note_answer(self, any_has_requests: bool) -> None:
        """A step's answer has arrived. It was asked less than INTERVAL steps ago, so all cores still have time to stop
        after the same step."""
        if not any_has_requests:
            self._stops_after = (self.num_steps // INTERVAL + 1) * INTERVAL
