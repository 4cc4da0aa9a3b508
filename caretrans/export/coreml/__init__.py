"""Core ML: conversion, evaluation of its programs on any system, and what only a Mac can measure."""
