from pyg_attnpool.cli import entry

if __name__ == "__main__":
    entry()
