//! The subcommands that ask a running agent.
