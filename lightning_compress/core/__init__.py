"""Machinery shared by the methods: selection, surgery, profiling, losses, reports. It knows no method by name."""
