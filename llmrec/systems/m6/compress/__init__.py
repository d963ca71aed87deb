"""The command compress: how much quality each millisecond and megabyte of a tuned model buys."""
