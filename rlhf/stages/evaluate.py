def run(cfg, run_dir):
    raise NotImplementedError
