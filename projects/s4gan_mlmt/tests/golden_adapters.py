"""For every recorded case of s4GAN + MLMT: its inputs to our public functions, our outputs under the recorded names."""

from __future__ import annotations

from projects.s4gan_mlmt.tests import adapters_data, adapters_losses, adapters_mlmt, adapters_networks

ADAPTERS = {
    **adapters_networks.ADAPTERS,
    **adapters_losses.ADAPTERS,
    **adapters_data.ADAPTERS,
    **adapters_mlmt.ADAPTERS,
}
