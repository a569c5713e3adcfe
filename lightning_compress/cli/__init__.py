"""The command line `lc`: train from configs, look a method up, measure, export, report."""
