"""The run as one HTML page, written when it ends."""

from __future__ import annotations

from streamcl.events import Event, Sink


class Report(Sink):
    """Writes `report.html` into the run's folder: the accuracy matrix, curves, forgetting, memory, time, settings; of a test-time
    stream what was served over time, beside the deployed model, and what the guard did.

    A run that fails or is interrupted gets a page as far as it was scored; `streamcl compare` draws several runs together.
    """

    def write(self, event: Event) -> None:
        if event.kind != "run_finished" or not (self.directory / "config.yaml").exists():
            return
        from streamcl.comparing import Run
        from streamcl.report_page import read_served, render
        from streamcl.writing import write_atomically

        done = event.fields["status"] == "done" or Run.read(self.directory).scores.get("per_task")
        if done or read_served(self.directory).blocks:
            write_atomically(self.directory / "report.html", render(self.directory))
