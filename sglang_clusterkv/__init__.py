"""ClusterKV for SGLang: long contexts attended by recalled clusters of keys (`--attention-backend clusterkv`)."""

__version__ = "0.2.0"
