"""Tracing: any ``nn.Module`` on fake tensors -> `simulator.workload.Workload`. The one part of the simulator that needs torch."""
