"""V-Triune's kernel: configuration, messages, transport, runtime, data, window, ledger, controller, checkpoint, command lines."""
