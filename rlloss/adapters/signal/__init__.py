"""Signal's interface (`forward_backward`, `optim_step`, eight loss names) over a `Session` and the library's losses.

    client = Client()
    training_client = client.get_training_client(client.create_run("path/or/hub-name"))
    result = await training_client.forward_backward(batch_data, "enhanced_ppo", {"reference_model": "base"})
    await training_client.optim_step()

A tensor `[batch, seq_len]` is aligned to its own tokens: position t is about token t. docs/signal.md has the table of
losses and what differs from Signal.
"""

from rlloss.adapters.signal.client import Client, TrainingClient
from rlloss.adapters.signal.registry import LOSSES

__all__ = ["LOSSES", "Client", "TrainingClient"]
