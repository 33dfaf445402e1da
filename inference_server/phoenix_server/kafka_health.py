"""What a consuming thread believes of its cluster, and when it asks to make sure.

A client's error may mean one broker of many, or a moment; so it only raises a doubt. The topics are asked for then, and
what comes of it is told, with the last error of the connection, which says more than that there was no answer.
"""

from collections.abc import Callable

from phoenix_server.kafka_client import Consumer, KafkaError, KafkaLink, LastError, Producer


class ClusterHealth:
    """Belongs to one thread. `report` is told None when all topics are there, else what is wrong."""

    def __init__(self, link: KafkaLink, topics: tuple[str, ...], report: Callable[[str | None], None]) -> None:
        self._link = link
        self._topics = topics
        self._report = report
        self._is_in_doubt = True
        self._last_error = LastError(link)

    def on_error(self, error: KafkaError) -> None:
        """Take what a client says of itself between records."""
        self._last_error.take(error)
        self._is_in_doubt = True

    def failed(self, fault: str) -> None:
        """Tell that a session ended for `fault`; it is taken back by `ask`."""
        self._is_in_doubt = True
        self._report(self._last_error.text or fault)

    def ask(self, client: Producer | Consumer, *, is_told: bool = True) -> bool:
        """Ask for the topics if there is doubt; return whether all is well. `is_told` False: tell faults only."""
        if not self._is_in_doubt:
            return True
        for topic in self._topics:
            fault = self._link.topic_fault(client, topic)
            if fault is not None:
                self._report(self._last_error.text or fault)
                return False
        if is_told:
            self._is_in_doubt = False
            self._last_error.text = ""
            self._report(None)
        return True
